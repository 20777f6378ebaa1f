"""From settings to a run, new or going on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ip_adapter_core.adapter import PROJECTIONS, IPAdapter
from ip_adapter_core.files import adapter_file as checkpoint

from . import fingerprints
from .checkpoints import Checkpoints
from .config import Settings
from .distributed import DTYPES, launched_precision, plain, prepare_accelerator, sharded
from .errors import TrainingError
from .evaluation.clip_score import load_clip
from .feed import Place, open_feed
from .loss import Dropped, Recipe
from .metrics import Meter
from .models.base import Base, load_base
from .models.frozen import FrozenEncoders, ImageEncoder
from .run import Run
from .same_run import check_same
from .sampling import SamplingSettings
from .unet import attach, cross_attention_layers, new_adapter
from .validation import Validation, ValidationSettings

logger = logging.getLogger(__name__)


def prepare(settings: Settings) -> Run:
    """Everything for training, on its devices; a run that `settings.out` holds goes on.

    Raises TrainingError for what a user can mend.
    """
    precision = settings.precision or launched_precision()
    accelerator = prepare_accelerator(settings, precision)
    checkpoints = Checkpoints(settings.out, settings.keep, accelerator)
    (done,) = broadcast_object_list([max(checkpoints.steps(), default=0)])

    dtype = DTYPES[precision]
    base, encoders = _frozen(settings, dtype)
    adapter = _adapter(settings, base, encoders)
    weights_of_base = fingerprints.of_settings(
        *(fingerprints.of_weights(x.to_k) for x in cross_attention_layers(base.unet).values())
    )
    nn.Module.to(base.unet, dtype)  # the adapter has started from its weights as the file has them
    recipe = Recipe(
        settings.prediction,
        settings.min_snr_gamma,
        settings.debiased_estimation,
        settings.zero_terminal_snr,
    )
    noise_schedule = recipe.schedule(base.scheduler)
    timesteps = noise_schedule.config.num_train_timesteps
    place = Place.of(settings, accelerator, done)
    feed = open_feed(settings, encoders, timesteps, place)

    identity = {
        "precision": precision,
        "launch": accelerator.distributed_type.value if sharded() else "each process whole",
        "global batch": place.batch,
        "data": feed.fingerprint,
        "base": weights_of_base,
        **encoders.fingerprints,
    }
    if done:
        check_same(checkpoints.run(done), settings, identity)
    ema = None
    if settings.ema is not None:
        ema = AveragedModel(adapter, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        accelerator.register_for_checkpointing(ema.to(accelerator.device))
        ema.n_averaged = ema.n_averaged.cpu()  # it is looked at each step, which would wait
    optimizer = _optimizer(settings, adapter)
    schedule = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.steps,
    )
    prepared, optimizer, schedule = accelerator.prepare(adapter, optimizer, schedule)
    if done:
        accelerator.load_state(str(checkpoints.path(done)))
        logger.info("going on after step %d", done)

    base.unet.to(accelerator.device)
    validation = _validation(
        settings, base, encoders, accelerator, noise_schedule.config, feed.size
    )
    if feed.raw:
        encoders.to(accelerator.device)
    meter = Meter(accelerator, Path(settings.out), settings.log_every)
    accelerator.init_trackers("ip-adapter", config=plain(settings))
    return Run(
        settings=settings,
        accelerator=accelerator,
        adapter=prepared,
        optimizer=optimizer,
        schedule=schedule,
        unet=base.unet,
        noise_schedule=noise_schedule,
        recipe=recipe,
        dropped=_on(accelerator.device, feed.dropped),
        scaling=base.vae.config.scaling_factor,
        shift=getattr(base.vae.config, "shift_factor", None) or 0.0,
        batches=meter.waiting(feed.batches),
        encode=feed.encode,
        checkpoints=checkpoints,
        meter=meter,
        ema=ema,
        validation=validation,
        identity=identity,
        step=done,
        saved=done,
    )


def _frozen(settings: Settings, dtype: torch.dtype) -> tuple[Base, FrozenEncoders]:
    """All parts that do not train, in `dtype` but for the UNet: float32."""
    base = load_base(settings.base, dtype, settings.vae, unet_dtype=torch.float32)
    attach(base.unet)
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    if settings.compile:
        base.unet.compile()
    kind = PROJECTIONS[settings.variant].features
    image_encoder = ImageEncoder.from_name(settings.image_encoder, dtype)
    return base, FrozenEncoders(base, image_encoder, kind)  # type: ignore[arg-type]


def _adapter(settings: Settings, base: Base, encoders: FrozenEncoders) -> IPAdapter:
    torch.manual_seed(settings.seed)
    width = encoders.image_encoder.feature_dim(encoders.kind)
    adapter = new_adapter(
        base.unet, settings.variant, width, settings.resampler_dim, settings.resampler_depth
    )
    if settings.adapter is None:
        return adapter
    try:
        start = checkpoint.load(settings.adapter)
    except checkpoint.CheckpointError as error:
        raise TrainingError(str(error)) from error
    if start.spec != adapter.spec:
        raise TrainingError(
            f"'{settings.adapter}' is {start.spec}, but --variant {settings.variant} with this "
            f"base and image encoder is {adapter.spec}. Give the variant, base and image encoder "
            "that it was trained with."
        )
    adapter.load_state_dict(start.state_dict())
    return adapter


def _optimizer(settings: Settings, adapter: IPAdapter) -> torch.optim.Optimizer:
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(
            "--optimizer adamw8bit needs the package bitsandbytes, which is not installed: "
            "`pip install bitsandbytes`, or use adamw."
        ) from error
    return AdamW8bit(groups, lr=settings.learning_rate)


def _validation(
    settings: Settings,
    base: Base,
    encoders: FrozenEncoders,
    accelerator: Accelerator,
    scheduler: Mapping[str, Any],
    size: tuple[int, int],
) -> Validation | None:
    if not settings.validate_every:
        return None
    encoders.to(accelerator.device)
    clip = settings.validation_clip
    validation = Validation(
        ValidationSettings(
            references=tuple(settings.validation_references),
            prompts=tuple(settings.validation_prompts),
            weights=tuple(settings.validation_weights),
            sampling=SamplingSettings(
                settings.validation_steps,
                settings.validation_guidance,
                size,
                batch=4,
            ),
        ),
        base,
        encoders.image_encoder,
        encoders.kind,
        Path(settings.out, "validation"),
        None if clip is None else load_clip(clip, accelerator.device),
        scheduler,
    )
    encoders.image_encoder.to("cpu")  # done with, unless the batches are pictures
    for _, encoder in base.text:
        encoder.to("cpu")
    return validation


def _on(device: torch.device, dropped: Dropped) -> Dropped:
    def moved(x: torch.Tensor | None) -> Any:
        return None if x is None else x.to(device)

    return Dropped(moved(dropped.features), moved(dropped.states), moved(dropped.pooled))
