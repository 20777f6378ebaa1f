"""What an image encoder sees of pictures."""

from __future__ import annotations

import comfy.model_management as memory
from comfy.clip_model import clip_preprocess
from comfy.clip_vision import ClipVisionModel
from torch import Tensor

from ..crops import checked, square_at, tiles
from .encode import CROPS, check_kind, prepare

SQUARES = ("point", "tiles")


def seen(
    clip_vision: ClipVisionModel, image: Tensor, crop: str, x: float, y: float, grid: int
) -> Tensor:
    """`image (N, H, W, C)` as it meets the encoder, `(M, size, size, 3)`: RGB of 8 bits, within
    0 … 1, before normalisation. Encoded with any crop it gives the same features.

    `crop`: those of `encode`; "point", the square of the short side around the point `x`, `y` in
    fractions of the picture; "tiles", M/N squares a picture that together cover it, `grid` along
    the short side. Raises ValueError for what `encode`, `square_at` or `tiles` refuse.
    """
    check_kind(clip_vision)
    if crop == "point":
        image = square_at(checked(image, "image"), x, y)
    elif crop == "tiles":
        image = tiles(checked(image, "image"), grid)
    elif crop in CROPS:
        image = prepare(clip_vision, image, crop, "image")
    else:
        raise ValueError(f"crop is {crop!r}; expected one of {', '.join((*CROPS, *SQUARES))}.")
    # The encoder's own device, whose resampling rounds its own way.
    pixels = clip_preprocess(
        image.to(clip_vision.load_device),
        size=clip_vision.image_size,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        crop=crop != "none",
    )
    return pixels.movedim(1, -1).contiguous().to(memory.intermediate_device())
