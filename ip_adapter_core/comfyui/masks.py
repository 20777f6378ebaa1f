"""Masks at the resolutions of a UNet's layers, made once per run and size of its latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

LEVELS = 4  # SD1.5's resolutions; SDXL has three of them
Size: TypeAlias = tuple[int, int]
"""Height and width of a latent."""
Area: TypeAlias = tuple[int, ...]
"""Height, width, y and x of a part of it."""
Deal: TypeAlias = Literal["in turn", "last repeated"]
"""How fewer rows than latents are dealt out: round and round, or the last one for all that are
left; then more rows than latents are cut, too."""
Resampling: TypeAlias = Literal["bicubic", "bilinear"]


@dataclass(frozen=True, eq=False)
class Masks:
    """What the image branch is multiplied with.

    `masks (M, H, W)`, which are dealt out to the latents of a batch (None: 1 everywhere), times
    `weights (N,)`, one a latent; the last one holds for all that follow.
    """

    masks: Tensor | None
    weights: Tensor
    deal: Deal = "in turn"
    resampling: Resampling = "bicubic"

    @cached_property
    def unweighted(self) -> Masks | None:
        """The same without weights, where those are folded into K' and V'."""
        if self.masks is None:
            return None
        return Masks(self.masks, torch.ones(1), self.deal, self.resampling)


@dataclass(frozen=True, eq=False)
class PreparedMasks:
    """`Masks` over a run's latents of `latent` (height, width).

    `numbers` of each latent's mask and its `weights`, both `(B,)`, or `(1,)` for all alike. The
    levels of `masks` are computed once for each part of the run's image; to `device` and `dtype`
    they are moved.
    """

    masks: Tensor | None
    numbers: Tensor
    weights: Tensor
    latent: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    resampling: Resampling = "bicubic"
    _levels: dict[tuple[Size, Area | None, Size | None] | None, Tensor] = field(
        default_factory=dict
    )

    def levels(self, latent: Size | None, area: Area | None, size: Size | None = None) -> Tensor:
        """Return `(B, Σ tokens, 1)`, or 1 for B: see `mask_levels`.

        `latent`: the size of the evaluated latents, see `whole`; `size`: that of a layer which is
        none of the levels. `(B, 1, 1)` where there are weights alone, which have no place.
        """
        sizes = None
        if self.masks is not None:
            sizes = whole(self.latent, latent or self.latent), area, size
        if sizes not in self._levels:
            levels = self.weights[:, None, None]
            if self.masks is not None and sizes is not None:
                found = mask_levels(self.masks, *sizes, self.resampling)
                levels = found[self.numbers] * levels
            self._levels[sizes] = levels.to(self.device, self.dtype)
        return self._levels[sizes]


def whole(run: Size, latent: Size) -> Size:
    """Return the whole image's size where latents are evaluated.

    A sampler may have enlarged the run's, but smaller ones are a part of it that something has cut
    out.
    """
    return latent if latent[0] * latent[1] > run[0] * run[1] else run


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of the latent and of each halving, as the UNet's strided layers round."""
    sizes = [(height, width)]
    while len(sizes) < LEVELS:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))  # type: ignore[arg-type]
    return sizes


def mask_levels(
    mask: Tensor,
    latent: Sequence[int],
    area: Sequence[int] | None,
    size: Size | None = None,
    resampling: Resampling = "bicubic",
) -> Tensor:
    """`mask (M, H, W)` at every level, one after the other: `(M, Σ heights·widths, 1)`.

    `latent` is the (height, width) that the whole mask lies over, `area` the part of it that is
    sampled: (height, width, y, x) in latent units, None for all. With a `size` it is that one in
    place of the levels. Each is sampled from the mask itself; "bicubic" is what diffusers does
    (`IPAdapterMaskProcessor.downsample`).
    """
    height, width, top, left = area or (*latent, 0, 0)
    grids = []
    for rows, columns in level_sizes(height, width) if size is None else [size]:
        y = _centers(rows, top / latent[0], height / latent[0])
        x = _centers(columns, left / latent[1], width / latent[1])
        grids.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
    grid = torch.cat(grids)[None, None].to(mask.device)
    # Coordinates of a 4096-pixel mask need float64; one mask at a time keeps the copy small.
    sampled = [
        grid_sample(
            one[None, None].double(),
            grid,
            mode=resampling,
            padding_mode="border",
            align_corners=False,
        )
        for one in mask
    ]
    return torch.cat(sampled).flatten(1)[..., None].to(mask.dtype)


def _centers(count: int, start: float, length: float) -> Tensor:
    """Return centers of `count` cells over [start, start + length] of a unit side, -1 … 1."""
    cells = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return 2 * (start + cells * length) - 1


@dataclass(frozen=True, eq=False)
class MaskRows:
    """A mask beside the rows of one UNet call.

    `levels (B, Σ tokens, 1)`, or `(B, 1, 1)` for one value a row; `at` gives `(B, tokens, 1)` at
    the size of a layer that other packs have shrunk to none of the levels.
    """

    levels: Tensor
    at: Callable[[Size], Tensor]

    def views(self, latent: Size) -> dict[int, Tensor]:
        """Return the levels by their number of tokens; under 0 what holds for every number.

        Raises RuntimeError if they were made for another size of the latents.
        """
        if self.levels.shape[1] == 1:
            return {0: self.levels}
        counts = [rows * columns for rows, columns in level_sizes(*latent)]
        if sum(counts) != self.levels.shape[1]:
            height, width = latent
            raise RuntimeError(
                f"The image prompt's mask was laid over the sampled latent, but the model is run "
                f"on a part of {height}×{width} of it that another node cut out without the mask. "
                "Take the mask or that (tiling) node out."
            )
        return dict(zip(counts, self.levels.split(counts, dim=1), strict=True))


def layer_size(tokens: int, latent: Size, told: Sequence[int] | None) -> Size | None:
    """Return height and width of a layer of so many tokens.

    What its block has `told` goes before the levels of the latent; None where neither fits.
    """
    sizes = [] if told is None else [(told[-2], told[-1])]
    sizes += level_sizes(*latent)
    return next((size for size in sizes if size[0] * size[1] == tokens), None)
