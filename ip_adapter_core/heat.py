"""A map of shares as colours over a picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# From nothing to all, dark to light, so that it reads in grey too.
_COLOURS = ((0.00, 0.00, 0.16), (0.36, 0.06, 0.46), (0.78, 0.18, 0.34), (0.98, 0.55, 0.12))
_LIGHTEST = (1.00, 0.97, 0.66)


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps `(N, h, w)` at a picture's size, `(N, height, width)`."""
    return interpolate(maps[:, None], (height, width), mode="bilinear")[:, 0]


def check_picture(pictures: Tensor, maps: Tensor) -> None:
    """Raise ValueError unless `pictures (N, H, W, C)` can be those of `maps (N, h, w)`: as many,
    and of the same shape but for the size, to 2 percent."""
    if len(pictures) != len(maps):
        raise ValueError(
            f"image holds {len(pictures)} pictures, but samples {len(maps)} latents. Connect the "
            "pictures decoded from these samples, all of them."
        )
    (height, width), (rows, columns) = pictures.shape[1:3], maps.shape[1:]
    if abs(width * rows - height * columns) > 0.02 * height * columns:
        raise ValueError(
            f"image is {width}×{height} pixels, but samples {columns}×{rows} latents: expected a "
            "picture of the same proportions. Connect the one decoded from these samples, uncut."
        )


def coloured(maps: Tensor) -> Tensor:
    """Maps `(N, H, W)` as colours, `(N, H, W, 3)`: from 0 to the largest value among all of them,
    so that a map that stays below 0.001 looks like one that reaches 0.5."""
    table = torch.tensor([*_COLOURS, _LIGHTEST])
    place = maps / maps.max().clamp(min=1e-12) * (len(table) - 1)
    low = place.floor().long().clamp(0, len(table) - 2)
    part = (place - low)[..., None]
    return torch.lerp(table[low], table[low + 1], part)


def over(pictures: Tensor, maps: Tensor, opacity: float) -> Tensor:
    """The colours of `maps (N, H, W)` laid over `pictures (N, H, W, C)`, of which the first three
    channels count: `(N, H, W, 3)`. `opacity`: 0 for the picture alone, 1 for the map alone."""
    return torch.lerp(pictures[..., :3], coloured(maps).to(pictures), opacity)
