"""Images without content, for an image prompt to be steered away from.

The empty image of training leaves guidance free. An image's own noise in its place keeps its
colors or texture from being part of what is sought, and so brings its content forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import conv1d, interpolate

from .crops import checked

GRAIN = 224  # grains of noise along the short side, so that an encoder sees what was drawn
CELLS = 16  # along the short side: each a patch of a ViT/14 at 224 px
WIDEST = 8.0  # standard deviation in pixels; wider blurs are made of smaller images,
FEWEST = 16  # pixels of a side, if it has that many


def noise(image: Tensor, kind: str, strength: float, blur: float, seed: int) -> Tensor:
    """Give `image (N, H, W, C)` over to noise by `strength`: `(N, H, W, 3)` within 0 … 1.

    0 leaves the images as they are, 1 leaves nothing of what they show. `kind`:

    - "gaussian": mixed with normal noise of mean 0.5 and standard deviation 0.25;
    - "dissolve": grains, a share of `strength`, take random colors, each channel uniform;
    - "shuffle": square cells, a share of `strength`, change places. Every colour stays.

    Then it is blurred by a Gaussian of standard deviation `blur`, in pixels of an image whose
    short side is 224. All depends on `seed` alone, and on no other generator.
    Raises ValueError for images that `checked` refuses and values out of their domain.
    """
    image = checked(image, "image")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    if not 0 <= strength <= 1:  # nor NaN
        raise ValueError(f"strength is {strength}; expected 0 (the image) … 1 (noise alone).")
    if not (blur >= 0 and math.isfinite(blur)):
        raise ValueError(f"blur is {blur}; expected a finite number of pixels, 0 for none.")
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.stack([KINDS[kind](one, strength, generator) for one in image.cpu()])
    sigma = blur * min(noisy.shape[1:3]) / GRAIN
    return (_blurred(noisy, sigma) if sigma > 0 else noisy).clamp(0, 1)


def _gaussian(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    normal = _grains(image, lambda shape: torch.randn(shape, generator=generator))
    return torch.lerp(image, 0.5 + 0.25 * normal, strength)


def _dissolve(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    def uniform(shape: list[int]) -> Tensor:
        return torch.rand(shape, generator=generator)

    colors = _grains(image, uniform)
    chosen = _grains(image, lambda shape: uniform([*shape[:2], 1])) < strength
    return torch.where(chosen, colors, image)


def _shuffle(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Let cells change places; what is left over at the edges stays."""
    height, width = image.shape[:2]
    side = max(1, min(height, width) // CELLS)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    result = image.clone()
    area = result[top : top + rows * side, left : left + columns * side]
    cells = rearrange(area, "(r h) (c w) d -> (r c) h w d", h=side, w=side)
    order = torch.randperm(rows * columns, generator=generator)
    chosen = order[: round(strength * rows * columns)]
    cells[chosen] = cells[chosen.roll(1)]  # in a circle: each chosen cell moves
    area.copy_(rearrange(cells, "(r c) h w d -> (r h) (c w) d", r=rows))
    return result


def _grains(image: Tensor, draw: Callable[[list[int]], Tensor]) -> Tensor:
    """Draw a grid of GRAIN along the short side, or of the pixels where there are fewer."""
    height, width, channels = image.shape
    scale = min(1.0, GRAIN / min(height, width))
    size = [max(1, round(side * scale)) for side in (height, width)]
    drawn = draw([*size, channels])
    rows, columns = (
        torch.arange(side) * count // side
        for side, count in zip((height, width), size, strict=True)
    )
    return drawn[rows][:, columns]


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Blur `images (N, H, W, C)` by `sigma` pixels, at a cost that only their size decides."""
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
    """Blur along the last axis by a Gaussian, cut at four deviations.

    Edges mean over what is there, so that they do not darken.
    """
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
