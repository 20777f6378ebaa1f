"""Nodes of ComfyUI_IPAdapter_plus that prepare pictures."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...ip_adapter_core.ipadapter_plus.pictures import (
    CROPS,
    INTERPOLATIONS,
    NOISES,
    for_face_detection,
    noise,
    prepared,
)
from . import inputs as of


class IPAdapterNoise(of.Served):
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make_noise"
    CATEGORY = "ipadapter/utils"
    REQUIRED: ClassVar[of.Inputs] = {
        "type": of.choice(*NOISES),
        "strength": of.number(1.0, 0, 1),
        "blur": of.whole(0, 0, 32, step=1),
    }
    OPTIONAL: ClassVar[of.Inputs] = {"image_optional": of.IMAGE}

    def make_noise(
        self, type: str, strength: float, blur: int = 0, image_optional: Any = None, **_: Any
    ) -> tuple[Tensor]:
        return (noise(image_optional, type, strength, blur),)


class PrepImageForClipVision(of.Served):
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "prep_image"
    CATEGORY = "ipadapter/utils"
    REQUIRED: ClassVar[of.Inputs] = {
        "image": of.IMAGE,
        "interpolation": of.choice(*INTERPOLATIONS),
        "crop_position": of.choice(*CROPS),
        "sharpening": of.number(0.0, 0, 1),
    }

    def prep_image(
        self,
        image: Tensor,
        interpolation: str = "LANCZOS",
        crop_position: str = "center",
        sharpening: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor]:
        return (prepared(image, interpolation, crop_position, sharpening),)


class PrepImageForInsightFace(of.Served):
    DEPRECATED = True
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "prep_image"
    CATEGORY = "ipadapter"
    REQUIRED: ClassVar[of.Inputs] = {
        "image": of.IMAGE,
        "crop_position": of.choice("center", "top", "bottom", "left", "right"),
        "sharpening": of.number(0.0, 0, 1),
        "pad_around": ("BOOLEAN", {"default": True}),
    }

    def prep_image(
        self,
        image: Tensor,
        crop_position: str = "center",
        sharpening: float = 0.0,
        pad_around: bool = True,
        **_: Any,
    ) -> tuple[Tensor]:
        return (for_face_detection(image, crop_position, sharpening, pad_around),)
