"""What accelerate does for a run, from settings and how the run was launched."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, LoggerType, ProjectConfiguration

from .config import Settings
from .errors import TrainingError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def sharded() -> bool:
    """Whether DeepSpeed or FSDP split the adapter."""
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    return any(os.environ.get(name, "").lower() in ("1", "true") for name in names)


def launched_precision() -> str:
    """What `accelerate launch` was told, as DTYPES names it."""
    found = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return "fp32" if found == "no" else found


def _tracker(name: str) -> str | None:
    """What accelerate, which passes over a tracker that is not installed, is to log with."""
    if name == "none":
        return None
    known, here = [*LoggerType.list()], [str(tracker) for tracker in get_available_trackers()]
    if name in known and name != "all" and name not in here:
        raise TrainingError(
            f"log_with is '{name}', but its package is not installed. Install it, or give one of "
            f"{', '.join(['none', *here])}."
        )
    if name not in known:
        raise TrainingError(
            f"log_with is '{name}'; expected none or one of accelerate's trackers: "
            f"{', '.join(known)}."
        )
    return name


def prepare_accelerator(settings: Settings, precision: str) -> Accelerator:
    """Accelerate's, in a precision that DTYPES names. Raises TrainingError for what a user can
    mend."""
    if precision not in DTYPES:
        raise TrainingError(
            f"precision is '{precision}'; expected one of {', '.join(DTYPES)}. Give it with "
            "--precision, or with accelerate launch --mixed_precision."
        )
    if sharded() and precision == "fp16":
        raise TrainingError(
            "DeepSpeed and FSDP are used with bf16 or no mixed precision here: fp16 needs its loss "
            "scaled, which they would do to the adapter's weights too. Give --precision bf16."
        )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if fsdp and (settings.ema is not None or settings.validate_every):
        raise TrainingError(
            "ema and validate_every need the whole adapter in each process, which FSDP splits. "
            "Leave them out, or use training/configs/gpus.yaml: the adapter fits every GPU."
        )
    accelerator = Accelerator(
        # Those who split the adapter would make its weights half precision as well.
        mixed_precision="no" if sharded() or precision == "fp32" else precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.accumulation, sync_with_dataloader=False
        ),
        log_with=_tracker(settings.log_with),
        project_config=ProjectConfiguration(settings.out, str(Path(settings.out, "logs"))),
        step_scheduler_with_optimizer=False,
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # it wants to know, and sees no loader to learn it from
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = settings.accumulation
        plugin.deepspeed_config["gradient_clipping"] = settings.clip_norm or 0.0
    return accelerator


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as trackers take them."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
        for name, value in asdict(settings).items()
    }
