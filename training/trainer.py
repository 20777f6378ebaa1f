"""A training run: set up, trained step by step, saved and resumed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ip_adapter_core.adapter import PROJECTIONS, IPAdapter
from ip_adapter_core.files import adapter_file

from . import fingerprints
from .checkpoints import Checkpoints, NotWrittenError, check_same_run
from .config import TrainConfig
from .dataloader import Position, open_data
from .distributed import DTYPES, StopRequest, make_accelerator, sharded
from .errors import TrainingError
from .evaluation.clip_score import load_clip
from .history import History
from .loss import Batch, DiffusionLoss, training_scheduler
from .metrics import MetricsLogger
from .models.base import load_base
from .models.frozen import FrozenEncoders, reference_encoder
from .report import RunReport, about
from .unet import LORA_RANK, attach, cross_attention_layers, new_adapter
from .validation import FOLDER as SHEETS
from .validation import Validation, validation_loss

VALIDATION_LOSS = "validation_loss"

logger = logging.getLogger(__name__)


class Trainer:
    """Trains an adapter on a frozen base, as its config says.

    A run that `config.output_dir` holds is resumed: `step`, the optimizer steps done, says where.
    Raises TrainingError for what a user can mend, before the first step.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        precision = config.mixed_precision or launched
        self.accelerator = make_accelerator(config, precision)
        self.device = self.accelerator.device
        self.checkpoints = Checkpoints(
            config.output_dir, config.checkpoints_total_limit, self.accelerator
        )
        last = max(self.checkpoints.steps(), default=0)
        (self.step,) = broadcast_object_list([last])
        self.saved_step = self.step

        # The frozen models, in float32 where the adapter starts from their weights.
        dtype = DTYPES[precision]
        base = load_base(
            config.pretrained_model_name_or_path,
            dtype,
            config.pretrained_vae_model_name_or_path,
            unet_dtype=torch.float32,
        )
        self.unet: Any = base.unet
        self.encoders = FrozenEncoders(
            base,
            reference_encoder(config, dtype),
            PROJECTIONS[config.variant].features,
        )
        adapter = self._new_adapter()
        layers = cross_attention_layers(self.unet).values()
        base_weights = fingerprints.of_settings(
            *(fingerprints.of_weights(layer.to_k) for layer in layers)
        )
        attach(self.unet)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if config.torch_compile:
            self.unet.compile()
        nn.Module.to(self.unet, self.device, dtype)

        noise_scheduler = training_scheduler(base.scheduler, config)
        world = self.accelerator.num_processes
        position = Position(
            self.accelerator.process_index,
            world,
            batch=config.train_batch_size * world,
            step=self.step * config.gradient_accumulation_steps,
        )
        timesteps = noise_scheduler.config.num_train_timesteps
        data = open_data(config, self.encoders, timesteps, position)
        self.encode = data.encode
        self.loss = DiffusionLoss(
            self.unet, base.vae.config, noise_scheduler, data.dropped.to(self.device), config
        )
        launch = self.accelerator.distributed_type.value if sharded() else "each process whole"
        self.identity = {
            "precision": precision,
            "launch": launch,
            "global batch": position.batch,
            "data": data.fingerprint,
            "base": base_weights,
            **self.encoders.fingerprints,
        }
        stored = self.checkpoints.run(self.step) if self.step else {}
        if self.step:
            check_same_run(stored, config, self.identity)
        self._prepare(adapter)

        self.validation: Validation | None = None
        self.held_out = data.held_out
        if data.raw or config.draws_sheets:
            self.encoders.to(self.device)
        if config.draws_sheets:
            clip = config.validation_clip_model
            self.validation = Validation(
                config,
                base,
                self.encoders.image_encoder,
                self.encoders.kind,
                Path(config.output_dir, SHEETS),
                None if clip is None else load_clip(clip, self.device),
                noise_scheduler.config,
                data.size,
            )
        if not data.raw:  # what a cache stands for; the VAE goes on to decode samples
            for module in (self.encoders.image_encoder, *(text.encoder for text in base.text)):
                module.to("cpu")
        folder = Path(config.output_dir)
        self.history = History(folder, config.max_train_steps)
        if self.accelerator.is_main_process:
            self.history.resume(self.step)
        self.metrics = MetricsLogger(self.accelerator, folder, config.logging_steps, self.history)
        self.metrics.resume(stored.get("metrics", ()))
        self.report = RunReport(
            config, self.history, data.left_out, about(self.accelerator, precision)
        )
        self.batches = self.metrics.waiting(data.batches)
        told = {  # as trackers take it
            name: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
            for name, value in asdict(config).items()
        }
        self.accelerator.log_with.append(self.history)
        self.accelerator.init_trackers("ip-adapter", config=told)

    def _new_adapter(self) -> IPAdapter:
        config = self.config
        torch.manual_seed(config.seed)
        adapter = new_adapter(
            self.unet,
            config.variant,
            self.encoders.image_encoder.feature_dim(self.encoders.kind),
            config.resampler_dim,
            config.resampler_depth,
        )
        if config.pretrained_ip_adapter_path is None:
            return adapter
        try:
            start = adapter_file.load(config.pretrained_ip_adapter_path)
        except adapter_file.CheckpointError as error:
            raise TrainingError(str(error)) from error
        if start.spec != adapter.spec:
            raise TrainingError(
                f"'{config.pretrained_ip_adapter_path}' is {start.spec}, but --variant "
                f"{config.variant} with this model and image encoder is {adapter.spec}. Give the "
                "variant, model and image encoder that it was trained with."
            )
        weights = {**start.state_dict(), **start.lora}
        shapes = {key: weight.shape for key, weight in adapter.state_dict().items()}
        if {key: weight.shape for key, weight in weights.items()} != shapes:
            found = next((len(x) for key, x in start.lora.items() if ".down." in key), "none")
            raise TrainingError(
                f"'{config.pretrained_ip_adapter_path}' has a LoRA of rank {found}; expected "
                f"{LORA_RANK}, as published FaceID adapters have it. Start from one of these."
            )
        adapter.load_state_dict(weights)
        return adapter

    def _prepare(self, adapter: IPAdapter) -> None:
        """Give the adapter and what steps it to accelerate, as the last checkpoint has them."""
        config = self.config
        self.ema: AveragedModel | None = None
        if config.use_ema:
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.ema = AveragedModel(adapter, multi_avg_fn=average).to(self.device)
            self.accelerator.register_for_checkpointing(self.ema)
            self.ema.n_averaged = self.ema.n_averaged.cpu()  # looked at each step: would wait
        optimizer = _optimizer(config, adapter)
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.adapter, self.optimizer, self.lr_scheduler = self.accelerator.prepare(
            adapter, optimizer, lr_scheduler
        )
        if self.step:
            self.accelerator.load_state(str(self.checkpoints.path(self.step)))
            logger.info("going on after step %d", self.step)

    def train(self) -> None:
        """Train until `max_train_steps`, or until asked to stop; saved either way."""
        with StopRequest(self.accelerator) as stop:
            self.first_validation()
            self.metrics.begin()
            bar = tqdm(
                initial=self.step,
                total=self.config.max_train_steps,
                desc="training",
                smoothing=0,  # time left by the mean, samples and checkpoints included
                disable=None if self.accelerator.is_local_main_process else True,
            )
            with bar:
                while self.step < self.config.max_train_steps and not stop.requested():
                    self.train_step()
                    self.after_step(bar)
                self.finish()

    def first_validation(self) -> None:
        """Validate what the first step will change, or what a kill after the last one prevented."""
        if not self.validates():
            return
        measured = drawn = False
        if self.step:
            known = self.history.series().get(VALIDATION_LOSS, {})
            sheet = self.validation is not None and self.validation.path(self.step).exists()
            measured, drawn = broadcast_object_list([self.step in known, sheet])
        if not measured:
            self.measure_held_out()
        if not drawn:
            self.draw_sheet()
        self.write_report("training")

    def train_step(self) -> None:
        """Take one optimizer step, over `gradient_accumulation_steps` batches."""
        for _ in range(self.config.gradient_accumulation_steps):
            batch = next(self.batches)
            with self.accelerator.accumulate(self.adapter):
                loss = self.training_loss(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.config.max_grad_norm is not None:
                    self.accelerator.clip_grad_norm_(
                        self.adapter.parameters(), self.config.max_grad_norm
                    )
                self.optimizer.step()  # accelerate's: only when the gradients are whole
                self.optimizer.zero_grad()
            self.metrics.add(loss, batch)

    def training_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch from the data loader."""
        batch = self.encode(send_to_device(batch, self.device, non_blocking=True))
        return self.loss(self.adapter, batch)

    def after_step(self, bar: tqdm) -> None:
        """Average, log, save and draw, as far as this step is the time for it."""
        config = self.config
        self.lr_scheduler.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update_parameters(self.accelerator.unwrap_model(self.adapter))
        self.metrics.report(self.step, self.lr_scheduler.get_last_lr()[0], bar)
        saved = self.step % config.checkpointing_steps == 0
        if saved:
            try:
                self.save()
            except NotWrittenError as error:
                if self.step == config.max_train_steps:
                    raise
                logger.error("%s Training goes on until then.", error)
        validated = self.validates()
        if validated:
            self.measure_held_out()
            self.draw_sheet()
        if (saved or validated) and self.step < config.max_train_steps:  # `finish` does at the end
            self.write_report("training")

    def validates(self) -> bool:
        """Whether this step is the time to validate, and there is something to do it with."""
        every = self.config.validation_steps
        return bool(every and self.step % every == 0 and (self.held_out or self.validation))

    def measure_held_out(self) -> None:
        """Log the loss of the rows held out, if there are any."""
        if self.held_out is None:
            return
        value = validation_loss(self.metrics.waiting(self.held_out()), self.held_out_loss)
        self.accelerator.log({VALIDATION_LOSS: value}, step=self.step)
        if self.accelerator.is_main_process:
            logger.info("step %d: validation loss %.5f", self.step, value)

    def draw_sheet(self) -> None:
        """Draw the validation's contact sheet, if there is one."""
        if self.validation is not None:
            self.validation(self.accelerator, self.sampled(), self.step)

    def write_report(self, state: str) -> None:
        """Write the run's page, in one process."""
        if self.accelerator.is_main_process:
            self.report.write(self.step, state)

    def held_out_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch of rows held out, of the adapter that would be saved."""
        self.metrics.note_broken(batch["broken"])
        batch = self.encode(send_to_device(batch, self.device, non_blocking=True))
        return self.loss(self.sampled(), batch)

    def sampled(self) -> IPAdapter:
        """Return the adapter to look at: the average, if there is one."""
        if self.ema is not None:
            return self.ema.module  # type: ignore[return-value]
        return self.accelerator.unwrap_model(self.adapter)  # type: ignore[no-any-return]

    def save(self) -> None:
        """Write a checkpoint of this step; every process calls this, and all raise alike.

        Raises NotWrittenError, or TrainingError if training has diverged: nothing is worth writing.
        """
        if self.ema is not None:
            weights = self.ema.module.state_dict()
        else:
            weights = dict(self.accelerator.get_state_dict(self.adapter))
        diverged = [message for message in gather_object([self._diverged(weights)]) if message]
        if diverged:
            raise TrainingError(diverged[0])
        run = {
            "step": self.step,
            "settings": asdict(self.config),
            "identity": self.identity,
            "metrics": self.metrics.state(),
        }
        self.checkpoints.save(self.step, weights, self._metadata(), run)
        self.saved_step = self.step

    def _diverged(self, weights: Mapping[str, Tensor]) -> str:
        """Return what is not finite, or nothing."""
        try:
            self.metrics.check()
        except TrainingError as error:
            return str(error)
        bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
        if not bad:
            return ""
        return (
            f"{len(bad)} of the adapter's {len(weights)} tensors hold NaN or infinite values "
            f"({bad[0]} first), so step {self.step} was not saved. Start a new --output_dir from "
            "the last checkpoint (--pretrained_ip_adapter_path OUTPUT_DIR/ip-adapter.safetensors) "
            "with a lower learning_rate or with max_grad_norm 1."
        )

    def _metadata(self) -> dict[str, str]:
        """Return what the adapter's file tells about itself: no paths, for others will read it."""
        models = {
            name: path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
            for name in ("pretrained_model_name_or_path", "image_encoder_path", "face_encoder")
            if (path := getattr(self.config, name))
        }
        about = {"step": self.step, **models}
        about |= {"settings": self.config.identity(), "identity": self.identity}
        # One entry only: safetensors writes several in any order, and files would differ.
        return {"ip_adapter": json.dumps(about, sort_keys=True)}

    def finish(self) -> None:
        """Save unless that is done, and close the trackers."""
        if self.saved_step != self.step:
            self.save()
        self.write_report("finished" if self.step >= self.config.max_train_steps else "stopped")
        if self.accelerator.is_main_process:
            logger.info(
                "step %d of %d: '%s'",
                *(self.step, self.config.max_train_steps, self.checkpoints.newest),
            )
        self.accelerator.end_training()
        torch.cuda.empty_cache()


def _optimizer(config: TrainConfig, adapter: IPAdapter) -> torch.optim.Optimizer:
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.adam_weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if not config.use_8bit_adam:
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(
            "--use_8bit_adam needs the package bitsandbytes, which is not installed: "
            "`pip install bitsandbytes`, or leave it out."
        ) from error
    return AdamW8bit(groups, lr=config.learning_rate)
