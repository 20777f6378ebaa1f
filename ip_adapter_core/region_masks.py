"""Several masks over one image: what each may take where they overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

OVERLAPS = ("normalize", "add")


def share_out(masks: Sequence[Tensor], overlap: str, rest: bool = False) -> list[Tensor]:
    """Make masks that go together of one mask a region, `(M, H, W)` or `(H, W)` of any sizes.

    Args:
        masks: One a region.
        overlap: "normalize" divides them where their sum exceeds 1, so that regions share and none
            is stronger than λ; "add" leaves them as they are.
        rest: Add a mask at the end, of what the others leave free.

    Raises:
        ValueError: `overlap` is another one, there is no mask, or the numbers M do not fit.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap is {overlap!r}; expected one of {', '.join(OVERLAPS)}.")
    if not masks:
        raise ValueError("There is no mask; expected one for each region, or for all but the last.")
    together = _alike([mask if mask.ndim == 3 else mask[None] for mask in masks])
    total = torch.zeros_like(together[0])
    for mask in together:
        total += mask.clamp(min=0)
    if overlap == "normalize":
        together = [mask / total.clamp(min=1) for mask in together]
    return [*together, (1 - total).clamp(min=0)] if rest else together


def _alike(masks: list[Tensor]) -> list[Tensor]:
    """All of the largest size and number."""
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (1, 2))
    count = max(len(mask) for mask in masks)
    odd = next((mask for mask in masks if len(mask) not in (1, count)), None)
    if odd is not None:
        raise ValueError(
            f"One region has {len(odd)} masks and another {count}: give each one mask, or one for "
            "each latent."
        )
    return [_resized(mask.float(), (height, width)).expand(count, -1, -1) for mask in masks]


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(mask.shape[1:]) == size:
        return mask
    return interpolate(mask[None], size, mode="bilinear", align_corners=False)[0]
