"""A training run: everything that a step needs, and what happens between steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ip_adapter_core.adapter import IPAdapter

from .checkpoints import Checkpoints, NotWrittenError
from .config import Settings
from .errors import TrainingError
from .loss import Batch, Dropped, Recipe
from .metrics import Meter
from .validation import Validation

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What `train.py` trains with. `step`: optimiser steps done.

    `adapter`, `optimizer`, `schedule` are accelerate's; the UNet is frozen and only itself.
    `encode` turns a batch of pictures and texts into one of a cache, or does nothing.
    `identity`: fingerprints of data and models, for whoever goes on.
    """

    settings: Settings
    accelerator: Accelerator
    adapter: nn.Module
    optimizer: Any
    schedule: Any
    unet: Any
    noise_schedule: Any
    recipe: Recipe
    dropped: Dropped
    scaling: float
    shift: float
    batches: Iterator[Batch]
    encode: Callable[[Batch], Batch]
    checkpoints: Checkpoints
    meter: Meter
    ema: AveragedModel | None
    validation: Validation | None
    identity: Mapping[str, Any]
    step: int = 0
    saved: int = 0

    def autocast(self) -> torch.autocast:
        """For the adapter, whose weights are float32, the precision of the frozen parts."""
        dtype = self.unet.dtype
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype != torch.float32)

    def predict(
        self,
        seen: Tensor,
        batch: Batch,
        states: Tensor,
        pooled: Tensor | None,
        keys_values: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The frozen UNet's prediction `(B, 4, h, w)`; gradients flow into `keys_values`."""
        dtype = self.unet.dtype
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled.to(dtype), "time_ids": batch["time_ids"]}
        return self.unet(
            seen.to(dtype),
            batch["timestep"],
            states.to(dtype),
            added_cond_kwargs=added,
            cross_attention_kwargs={"ip_hidden_states": keys_values},
            return_dict=False,
        )[0]

    def after_step(self, bar: tqdm) -> None:
        """Average, report, save and draw, as far as this step is the time for it."""
        self.schedule.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update_parameters(self.accelerator.unwrap_model(self.adapter))
        self.meter.report(self.step, self.schedule.get_last_lr()[0], bar)
        if self.step % self.settings.save_every == 0:
            try:
                self.save()
            except NotWrittenError as error:
                if self.step == self.settings.steps:
                    raise
                logger.error("%s Training goes on until then.", error)
        every = self.settings.validate_every
        if self.validation is not None and every and self.step % every == 0:
            self.validation(self.accelerator, self.sampled(), self.step)

    def sampled(self) -> IPAdapter:
        """The adapter to look at: the average, if there is one."""
        found = self.accelerator.unwrap_model(self.adapter) if self.ema is None else self.ema.module
        return found  # type: ignore[return-value]

    def save(self) -> None:
        """Write a checkpoint of this step. Raises NotWrittenError if that cannot be, TrainingError
        if training has diverged: then there is nothing worth writing. In all processes alike."""
        weights = self._weights()
        diverged = self._diverged(weights)
        told = [text for text in gather_object([diverged]) if text]
        if told:
            raise TrainingError(told[0])
        run = {
            "step": self.step,
            "settings": asdict(self.settings),
            "identity": self.identity,
        }
        self.checkpoints.save(self.step, weights, self.metadata(), run)
        self.saved = self.step

    def _diverged(self, weights: Mapping[str, Tensor]) -> str:
        try:
            self.meter.check()
        except TrainingError as error:
            return str(error)
        bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
        if not bad:
            return ""
        return (
            f"{len(bad)} of the adapter's {len(weights)} tensors hold NaN or infinite values "
            f"({bad[0]} first), so step {self.step} was not saved. Start a new --out from the "
            "last checkpoint (--adapter OUT/ip-adapter.safetensors) with a lower learning_rate or "
            "with clip_norm 1."
        )

    def _weights(self) -> dict[str, Tensor]:
        if self.ema is not None:
            return self.ema.module.state_dict()
        return dict(self.accelerator.get_state_dict(self.adapter))

    def metadata(self) -> dict[str, str]:
        """What the adapter's file tells about itself. No paths: files are given to others, and
        equal runs in two folders shall give equal files."""
        models = {
            name: getattr(self.settings, name).replace("\\", "/").rsplit("/", 1)[-1]
            for name in ("base", "image_encoder")
        }
        about = {
            "step": self.step,
            **models,
            "settings": self.settings.deciding(),
            "identity": self.identity,
        }
        # One entry only: safetensors writes several in any order, and files would differ.
        return {"ip_adapter": json.dumps(about, sort_keys=True)}

    def finish(self) -> None:
        """Save unless that is done, and close the trackers."""
        if self.saved != self.step:
            self.save()
        if self.accelerator.is_main_process:
            logger.info(
                "step %d of %d: '%s'",
                *(self.step, self.settings.steps, self.checkpoints.newest),
            )
        self.accelerator.end_training()
        torch.cuda.empty_cache()
