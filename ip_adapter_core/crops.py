"""Images as nodes get them: checked, and the squares that are cut out of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_TILES = 64  # of one image: each is an image of the prompt
MAX_GRID = 4


def checked(image: Tensor, name: str) -> Tensor:
    """Return RGB images `(N, H, W, 3)`, float32 within 0 … 1, of `(N, H, W, C)`, C = 1, 3 or 4.

    What lies beyond 0 … 1 is cut off, so that whole numbers of 0 … 255 become white. Alpha is
    dropped: colors under transparent pixels count like all others. Raises ValueError, which
    begins with `name`, for no images, other shapes, or values that are not finite.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} has shape {list(image.shape)}; expected [images, height, width, channels] "
            "with 1 (grey), 3 (RGB) or 4 (RGBA) channels."
        )
    if 0 in image.shape:
        raise ValueError(
            f"{name} holds no pixels (shape {list(image.shape)}). Connect at least one image."
        )
    if not image.isfinite().all():
        raise ValueError(
            f"{name} contains NaN or infinite pixels. Look at the node that made it; a VAE in "
            "half precision is a common cause."
        )
    image = image.float().clamp(0, 1)
    return image.expand(-1, -1, -1, 3) if image.shape[-1] == 1 else image[..., :3]


def square_at(image: Tensor, x: float, y: float) -> Tensor:
    """Cut the square `(N, S, S, C)` of the short side S whose center is nearest to a point.

    `x`, `y`: fractions of width and height, 0 the left and the top. The square stays inside the
    image. Raises ValueError for a point outside it.
    """
    for axis, value in (("x", x), ("y", y)):
        if not 0 <= value <= 1:  # nor NaN
            raise ValueError(f"{axis} is {value}; expected a fraction of the image's side, 0 … 1.")
    side = min(image.shape[1:3])
    for dim, fraction in ((1, y), (2, x)):
        length = image.shape[dim]
        start = min(max(round(fraction * length - side / 2), 0), length - side)
        image = image.narrow(dim, start, side)
    return image


def tiles(image: Tensor, grid: int = 1) -> Tensor:
    """Cut squares `(N·M, S, S, C)` that together cover an image.

    Those of the first image come first, row by row.

    `grid` squares stand along the short side, and along the long side as many as its ratio asks
    for, evenly spaced and overlapping where they do not fit exactly. With a grid of 1 they are as
    large as the short side, and an image that is square already stays whole.
    Raises ValueError for another grid than 1 … 4, or for more than 64 squares an image.
    """
    if not 1 <= grid <= MAX_GRID:
        raise ValueError(f"grid is {grid}; expected 1 … {MAX_GRID} squares along the short side.")
    height, width = image.shape[1:3]
    short, long = sorted((height, width))
    grid = min(grid, short)  # no square is smaller than a pixel
    along = max(math.ceil(long / short), round(grid * long / short))
    if grid * along > MAX_TILES:
        raise ValueError(
            f"An image of {width}×{height} pixels makes {grid * along} tiles; at most "
            f"{MAX_TILES} are cut. Crop it first, choose a smaller grid, or another crop."
        )
    side = max(math.ceil(short / grid), math.ceil(long / along))
    rows, columns = (grid, along) if height <= width else (along, grid)
    cut = [
        image[:, top : top + side, left : left + side]
        for top in _starts(height, side, rows)
        for left in _starts(width, side, columns)
    ]
    return torch.stack(cut, dim=1).flatten(0, 1)


def _starts(length: int, side: int, count: int) -> list[int]:
    """Return where `count` squares begin, from one edge to the other."""
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
