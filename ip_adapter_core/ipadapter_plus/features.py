"""Encoders' features as bare tensors, `(N, width)` or `(N, patches, width)`: the EMBEDS socket."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from ..image_prompt import ImageFeatures
from ..variants import FEATURE_KINDS

METHODS = ("concat", "add", "subtract", "average", "norm average")
EXTREMES = ("max", "min")
MOST_PIECES = 16  # along a side


def across_images(features: Tensor, method: str) -> Tensor:
    """Make one image of N, `(1, …)`; `concat`, or any other word, leaves them side by side.

    `subtract` takes the mean of all others from the first; `norm average` is the mean of the
    images after each component was divided by its norm over the images, as ComfyUI_IPAdapter_plus
    has it. One image stays as it is.
    """
    if len(features) == 1 or method not in (*METHODS[1:], *EXTREMES):
        return features
    if method == "add":
        return features.sum(0, keepdim=True)
    if method == "subtract":
        return features[:1] - features[1:].mean(0, keepdim=True)
    if method == "average":
        return features.mean(0, keepdim=True)
    if method == "norm average":
        norms = features.norm(dim=0, keepdim=True)
        return (features / norms.where(norms > 0, 1.0)).mean(0, keepdim=True)
    return features.amax(0, keepdim=True) if method == "max" else features.amin(0, keepdim=True)


def to_rows(rows: Tensor, count: int) -> Tensor:
    """Repeat the last row up to `count`, or cut what is beyond."""
    return rows[torch.arange(count).clamp(max=len(rows) - 1)]


def pieces(image: Tensor, grid: int) -> Tensor:
    """Cut images `(N, H, W, C)` into grid × grid equal pieces, `(N·grid², …)`, row by row.

    What is left over at the right and the bottom is cut off.
    """
    height, width = (side // grid for side in image.shape[1:3])
    kept = image[:, : grid * height, : grid * width]
    return rearrange(kept, "n (y h) (x w) c -> (n y x) h w c", y=grid, x=grid)


def enhanced(whole: ImageFeatures, cut: ImageFeatures, grid: int, ratio: float) -> ImageFeatures:
    """Return features of pictures together with those of their `pieces`, averaged to one's size.

    One picture: two images, whole times `ratio` and pieces. Several: whole times ratio plus pieces
    times the rest.
    """
    made = {}
    for kind in FEATURE_KINDS:
        one, small = getattr(whole, kind), getattr(cut, kind)
        if 0 not in small.shape:
            small = _joined(small, grid) if small.ndim == 3 else _joined_vectors(small, grid)
            if len(one) > 1:
                one = one * ratio + small * (1 - ratio)
            else:
                one = torch.cat([one * ratio, small])
        elif len(one) == 1:
            one = one.repeat(2, *[1] * (one.ndim - 1))
        made[kind] = one
    return ImageFeatures(**made)


def _joined(states: Tensor, grid: int) -> Tensor:
    """Lay the patches of pieces side by side and average them down; class tokens are averaged."""
    side = int((states.shape[1] - 1) ** 0.5)
    classes = reduce(states[:, :1], "(n k) one d -> n one d", "mean", k=grid * grid)
    patches = rearrange(
        states[:, 1 : 1 + side * side],
        "(n y x) (h w) d -> n d (y h) (x w)",
        y=grid,
        x=grid,
        h=side,
    )
    pooled = torch.nn.functional.adaptive_avg_pool2d(patches, (side, side))
    return torch.cat([classes, rearrange(pooled, "n d h w -> n (h w) d")], dim=1)


def _joined_vectors(embeds: Tensor, grid: int) -> Tensor:
    """Take an embedding for a square image, as ComfyUI_IPAdapter_plus does; it means nothing."""
    width = embeds.shape[1]
    side = int(width**0.5)
    if side * side != width:
        raise ValueError(
            f"The enhancer lays embeddings out as squares, but this encoder's are {width} wide, "
            "which is no square. Take a plus (fine-grained) adapter, which reads hidden states."
        )
    images = rearrange(embeds, "(n y x) (h w) -> n 1 (y h) (x w)", y=grid, x=grid, h=side)
    pooled = torch.nn.functional.adaptive_avg_pool2d(images, (side, side))
    return rearrange(pooled, "n 1 h w -> n (h w)")
