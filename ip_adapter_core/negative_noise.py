"""Pictures without content, for an image prompt to be steered away from.

The empty image of training leaves guidance free. A picture's own noise in its place keeps its
colours or texture from being part of what is sought, and so brings its content forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv1d, interpolate

from .crops import checked

GRAIN = 224  # grains of noise along the short side, so that an encoder sees what was drawn
CELLS = 16  # along the short side: each a patch of a ViT/14 at 224 px
WIDEST = 8.0  # standard deviation in pixels; wider blurs are made of smaller pictures,
FEWEST = 16  # pixels of a side, if it has that many


def noise(image: Tensor, kind: str, strength: float, blur: float, seed: int) -> Tensor:
    """`image (N, H, W, C)` given over to noise by `strength`, `(N, H, W, 3)` within 0 … 1.

    0 leaves the pictures as they are, 1 leaves nothing of what they show. `kind`:

    - "gaussian": mixed with normal noise of mean 0.5 and standard deviation 0.25;
    - "dissolve": grains, a share of `strength`, take random colours, each channel uniform;
    - "shuffle": square cells, a share of `strength`, change places. Every colour stays.

    Then it is blurred by a Gaussian of standard deviation `blur`, in pixels of a picture whose
    short side is 224. All depends on `seed` alone, and on no other generator.
    Raises ValueError for pictures that `checked` refuses and values out of their domain.
    """
    image = checked(image, "image")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    if not 0 <= strength <= 1:  # nor NaN
        raise ValueError(f"strength is {strength}; expected 0 (the picture) … 1 (noise alone).")
    if not (blur >= 0 and math.isfinite(blur)):
        raise ValueError(f"blur is {blur}; expected a finite number of pixels, 0 for none.")
    generator = torch.Generator().manual_seed(seed)
    pictures = [KINDS[kind](picture, strength, generator) for picture in image.cpu()]
    made = torch.stack(pictures)
    sigma = blur * min(made.shape[1:3]) / GRAIN
    if sigma > 0:
        made = _blurred(made, sigma)
    return made.clamp(0, 1)


def _gaussian(picture: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    normal = _grains(picture, lambda shape: torch.randn(shape, generator=generator))
    return torch.lerp(picture, 0.5 + 0.25 * normal, strength)


def _dissolve(picture: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    def uniform(shape: list[int]) -> Tensor:
        return torch.rand(shape, generator=generator)

    colours = _grains(picture, uniform)
    chosen = _grains(picture, lambda shape: uniform([*shape[:2], 1])) < strength
    return torch.where(chosen, colours, picture)


def _shuffle(picture: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Cells that are left over at the edges stay."""
    height, width = picture.shape[:2]
    side = max(1, min(height, width) // CELLS)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    made = picture.clone()
    area = made[top : top + rows * side, left : left + columns * side]
    cells = area.unflatten(1, (columns, side)).unflatten(0, (rows, side)).transpose(1, 2)
    order = torch.randperm(rows * columns, generator=generator)
    chosen = order[: round(strength * rows * columns)]
    flat = cells.flatten(0, 1).clone()
    flat[chosen] = flat[chosen.roll(1)]  # in a circle: each chosen cell moves
    cells.copy_(flat.unflatten(0, (rows, columns)))
    return made


def _grains(picture: Tensor, draw: Callable[[list[int]], Tensor]) -> Tensor:
    """`draw` of a grid of GRAIN along the short side, or of the pixels where there are fewer,
    over the whole picture."""
    height, width, channels = picture.shape
    scale = min(1.0, GRAIN / min(height, width))
    size = [max(1, round(side * scale)) for side in (height, width)]
    drawn = draw([*size, channels])
    rows, columns = (
        torch.arange(side) * count // side
        for side, count in zip((height, width), size, strict=True)
    )
    return drawn[rows][:, columns]


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """`images (N, H, W, C)` blurred by `sigma` pixels, at a cost that only their size decides."""
    size = images.shape[1:3]
    images = images.movedim(-1, 1)
    scale = min(1.0, WIDEST / sigma)
    if scale < 1:
        images = _resized(images, [min(side, max(FEWEST, round(side * scale))) for side in size])
    for dim, length in ((2, size[0]), (3, size[1])):
        lines = images.movedim(dim, -1)
        images = _smoothed(lines, sigma * lines.shape[-1] / length).movedim(-1, dim)
    if scale < 1:
        images = _resized(images, list(size))
    return images.movedim(1, -1).contiguous()


def _resized(images: Tensor, size: list[int]) -> Tensor:
    return interpolate(images, size, mode="bilinear", antialias=True)


def _smoothed(lines: Tensor, sigma: float) -> Tensor:
    """A Gaussian, cut at four deviations, along the last axis. Edges mean over what is there, so
    that they do not darken."""
    length = lines.shape[-1]
    reach = math.ceil(min(4 * sigma, length - 1))
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (places / sigma) ** 2).to(lines)[None, None]
    rows = lines.reshape(-1, 1, length)
    there = torch.ones_like(rows[:1])
    blurred = conv1d(rows, weights, padding=reach) / conv1d(there, weights, padding=reach)
    return blurred.reshape(lines.shape)


KINDS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "dissolve": _dissolve,
    "shuffle": _shuffle,
}
