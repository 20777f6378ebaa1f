"""The settings of an Apply node to prompts that sampling can use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..prompt import ImagePrompt, check_encoder, layer_weights
from .adapter import HostAdapter
from .conditioning import CompiledPrompt
from .layers import check_fits


@dataclass(frozen=True)
class Settings:
    """What the Apply nodes ask for. `weight` is λ; `start_at`, `end_at` are fractions of the
    schedule; `mask (M, H, W)` or `(H, W)`; `layer_weights` one multiplier a layer.

    Raises ValueError for values out of their domain.
    """

    adapter: HostAdapter
    image_prompt: ImagePrompt
    weight: float
    start_at: float
    end_at: float
    combine: str
    mask: Tensor | None = None
    layer_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "start_at", "end_at"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, found {value}.")
        if self.start_at > self.end_at:
            raise ValueError(
                f"start_at ({self.start_at}) lies after end_at ({self.end_at}). Both are "
                "fractions of the schedule, 0 its first step and 1 its end: swap them."
            )
        if self.mask is not None:
            self._check_mask(self.mask)

    @staticmethod
    def _check_mask(mask: Tensor) -> None:
        if mask.ndim not in (2, 3) or 0 in mask.shape:
            raise ValueError(
                f"mask has shape {list(mask.shape)}; expected [masks, height, width], none of "
                "them 0. Connect a mask that holds at least one picture."
            )
        if not mask.isfinite().all():
            raise ValueError("mask contains NaN or infinite values; expected 0 … 1.")


def compile_prompt(
    model: ModelPatcher, settings: Settings
) -> tuple[CompiledPrompt, CompiledPrompt] | None:
    """Positive and negative side, or None where λ is 0 on every layer: then nothing is to do.

    Raises ValueError if model, adapter and image prompt do not belong together.
    """
    adapter = settings.adapter
    check_fits(adapter.spec, adapter.name, model)
    check_encoder(adapter.spec, settings.image_prompt, adapter.name)
    weights = layer_weights(adapter.spec, settings.weight, settings.layer_weights)
    if not any(weights):
        return None
    packed = adapter.compile(settings.image_prompt, weights, settings.combine)
    mask = None if settings.mask is None else settings.mask.float().cpu()
    if mask is not None and mask.ndim == 2:
        mask = mask[None]
    positive, negative = (
        CompiledPrompt(side, mask, settings.start_at, settings.end_at, adapter.spec.layer_dims)
        for side in packed
    )
    return positive, negative
