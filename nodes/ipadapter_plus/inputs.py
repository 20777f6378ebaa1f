"""Inputs that the served nodes share, in the shape that ComfyUI gave nodes before its schemas.

Clients read that shape: a list of choices stands first, where a schema says COMBO.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

from ...ip_adapter_core.ipadapter_plus.features import METHODS
from ...ip_adapter_core.ipadapter_plus.weight_types import WEIGHT_TYPES
from ...ip_adapter_core.packing import SCALINGS

Input: TypeAlias = tuple[Any, ...]
Inputs: TypeAlias = dict[str, Input]

MODEL, IPADAPTER, IMAGE, MASK = ("MODEL",), ("IPADAPTER",), ("IMAGE",), ("MASK",)
CLIP_VISION, EMBEDS, PARAMS = ("CLIP_VISION",), ("EMBEDS",), ("IPADAPTER_PARAMS",)
CONDITIONING, INSIGHTFACE, STRATEGY = ("CONDITIONING",), ("INSIGHTFACE",), ("WEIGHTS_STRATEGY",)


def choice(*options: str, **more: Any) -> Input:
    """Return a list of choices, the first one of which is the default unless `default` says so."""
    return ([*options], more) if more else ([*options],)


def number(default: float, low: float, high: float, step: float = 0.05) -> Input:
    return ("FLOAT", {"default": default, "min": low, "max": high, "step": step})


def whole(default: int, low: int, high: int, **more: int) -> Input:
    return ("INT", {"default": default, "min": low, "max": high, **more})


def switch() -> Input:
    return ("BOOLEAN", {"default": False})


WEIGHT, WEIGHT_3 = number(1.0, -1, 5), number(1.0, -1, 3)
WEIGHT_TYPE, COMBINE, SCALING = choice(*WEIGHT_TYPES), choice(*METHODS), choice(*SCALINGS)
FRACTIONS: Inputs = {
    "start_at": number(0.0, 0.0, 1.0, 0.001),
    "end_at": number(1.0, 0.0, 1.0, 0.001),
}
AT_ONCE = whole(0, 0, 4096)
NEGATIVE_AND_MASK: Inputs = {"image_negative": IMAGE, "attn_mask": MASK}
BESIDES: Inputs = {**NEGATIVE_AND_MASK, "clip_vision": CLIP_VISION}
MODELS: Inputs = {"model": MODEL, "ipadapter": IPADAPTER}
COMBINED: Inputs = {"combine_embeds": COMBINE, **FRACTIONS, "embeds_scaling": SCALING}


def without(inputs: Inputs, name: str) -> Inputs:
    """Return the others, in their order."""
    return {other: kind for other, kind in inputs.items() if other != name}


class Served:
    """A node with its inputs as values, which ComfyUI and other packs ask it for."""

    REQUIRED: ClassVar[Inputs] = {}
    OPTIONAL: ClassVar[Inputs] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Inputs]:
        required = {"required": {**cls.REQUIRED}}
        return {**required, "optional": {**cls.OPTIONAL}} if cls.OPTIONAL else required
