"""The miniature's images: one shape before a background, drawn by rule.

A scene is a row of numbers that follow from (seed, number) alone, so that any stretch of the
endless stream can be had at once, in any size, in any process. Its caption names the shape and
nothing else: color, texture and background can come from nowhere but a reference. Its description
names all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.98, 0.86, 0.12),
    "green": (0.12, 0.62, 0.18),
    "cyan": (0.08, 0.74, 0.80),
    "blue": (0.14, 0.26, 0.90),
    "purple": (0.52, 0.16, 0.76),
    "pink": (0.96, 0.40, 0.68),
}
TEXTURES = ("plain", "banded", "striped", "checked")  # none, horizontal, vertical, both
BACKGROUNDS = {  # above, below
    "cream": ((0.99, 0.97, 0.90), (0.92, 0.86, 0.74)),
    "night": ((0.09, 0.10, 0.22), (0.17, 0.19, 0.34)),
    "sky": ((0.60, 0.80, 0.98), (0.80, 0.91, 1.00)),
    "meadow": ((0.80, 0.93, 0.66), (0.60, 0.80, 0.48)),
    "dusk": ((0.36, 0.26, 0.42), (0.66, 0.42, 0.46)),
}
PLACES = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
KINDS = {
    "shape": len(SHAPES),
    "colour": len(COLORS),
    "texture": len(TEXTURES),
    "background": len(BACKGROUNDS),
}
CELL = 8
"""Sixty-fourths of the image's width that a band, stripe or check is wide."""
DARK = 0.42  # of a texture's darker part, times the colour
SAME_SHAPE = 0.85  # of an adapter's references: how often they are the image itself
_FURTHEST = 0.18  # that a centre lies from the image's, across or down; half the image is 1
_DRAWS = 16  # numbers a scene, four of Philox's counts


@dataclass(frozen=True)
class Scenes:
    """N scenes. `shape`, `colour`, `texture`, `background (N,)`: numbers of the tables above.

    `x`, `y`: centre, −1 … 1; `size`: half the image is 1; `angle`: radians. `light`,
    `tint (N, 3)`: what makes two scenes of equal kinds differ in colour, factors near 1.
    """

    shape: Tensor
    colour: Tensor
    texture: Tensor
    background: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    angle: Tensor
    light: Tensor
    tint: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: slice | Tensor) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def place(self) -> Tensor:
        """Which ninth of where centers lie holds this one's, `(N,)`: a number of PLACES."""
        column, row = (((at / _FURTHEST + 1) * 1.5).long().clamp(0, 2) for at in (self.x, self.y))
        return row * 3 + column

    @property
    def captions(self) -> list[str]:
        """What an adapter's base is told in training: the shape."""
        return [caption(int(shape)) for shape in self.shape]

    @property
    def descriptions(self) -> list[str]:
        """All that is to be seen, for training an image encoder."""
        kinds = (self.shape, self.colour, self.texture, self.background)
        return [caption(*row) for row in zip(*(kind.tolist() for kind in kinds), strict=True)]


def caption(
    shape: int,
    colour: int | None = None,
    texture: int | None = None,
    background: int | None = None,
    place: int | None = None,
) -> str:
    """Name what is given: "a striped red star, sky background", "a red star, top left"."""
    named = [
        *([] if texture is None else [TEXTURES[texture]]),
        *([] if colour is None else [list(COLORS)[colour]]),
        SHAPES[shape],
    ]
    behind = "" if background is None else f", {list(BACKGROUNDS)[background]} background"
    where = "" if place is None else f", {PLACES[place]}"
    return f"a {' '.join(named)}{behind}{where}"


def scenes(seed: int, count: int, start: int = 0) -> Scenes:
    """Return scenes `start` … `start + count - 1` of the stream `seed`."""
    bits = np.random.Philox(key=seed)
    bits.advance(start * _DRAWS // 4)
    u = torch.from_numpy(np.random.Generator(bits).random((count, _DRAWS))).float()
    kinds = {name: (u[:, i] * n).long() for i, (name, n) in enumerate(KINDS.items())}
    return Scenes(
        **kinds,
        x=(u[:, 4] - 0.5) * (2 * _FURTHEST),
        y=(u[:, 5] - 0.5) * (2 * _FURTHEST),
        size=0.72 + 0.20 * u[:, 6],
        angle=(u[:, 7] - 0.5) * 0.5,
        light=0.9 + 0.2 * u[:, 8],
        tint=0.94 + 0.12 * u[:, 9:12],
    )


def references(
    targets: Scenes, seed: int, start: int = 0, same_shape: float = SAME_SHAPE
) -> Scenes:
    """Return a reference for each target: the image itself, as in the paper, or a variation.

    In all but `same_shape` of them the shape is drawn anew, so that an adapter learns to leave it
    to the text where there is one.
    """
    others = scenes(seed, len(targets), start)
    draw = np.random.Generator(np.random.Philox(key=seed + (1 << 32))).random(len(targets) + start)
    keep = torch.from_numpy(draw[start:]) < same_shape
    return replace(targets, shape=torch.where(keep, targets.shape, others.shape))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.12
    half = math.sqrt(3) / 2
    return torch.maximum(torch.maximum(y, half * x - y / 2), -half * x - y / 2) - 0.44


def _star(x: Tensor, y: Tensor) -> Tensor:
    turn = math.tau / 5
    angle = torch.atan2(x, -y)
    folded = torch.remainder(angle + turn / 2, turn) - turn / 2
    radius = torch.hypot(x, y)
    across, along = radius * folded.sin().abs(), radius * folded.cos()
    # The edge from the tip (0, 0.88) to the notch between two tips.
    notch_x, notch_y = 0.40 * math.sin(turn / 2), 0.40 * math.cos(turn / 2)
    dx, dy = notch_x, notch_y - 0.88
    return ((along - 0.88) * dx - across * dy) / math.hypot(dx, dy)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    upright = torch.maximum(x - 0.27, y - 0.78)
    return torch.minimum(upright, torch.maximum(x - 0.78, y - 0.27))


_DISTANCES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.hypot(x, y) - 0.72,
    lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.62,
    *(_triangle, _star),
    lambda x, y: (torch.hypot(x, y) - 0.55).abs() - 0.22,
    _cross,
)
"""Signed distances to the outlines of SHAPES."""


def outlines(rows: Scenes, side: int) -> Tensor:
    """Return how much of each pixel the shape covers, `(N, side, side)`, 0 … 1."""
    return _cover(_distance(rows, side), side)


def _distance(rows: Scenes, side: int, below: float = 0.0) -> Tensor:
    """Return signed distances `(N, side, side)` to the outline of shapes moved down by `below`.

    Negative inside; half the image is 1.
    """
    at = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    x = x - rows.x[:, None, None]
    y = y - rows.y[:, None, None] - below
    cos, sin = rows.angle.cos()[:, None, None], rows.angle.sin()[:, None, None]
    size = rows.size[:, None, None]
    x, y = (cos * x + sin * y) / size, (cos * y - sin * x) / size
    found = torch.empty_like(x)
    for shape, distance in enumerate(_DISTANCES):
        chosen = rows.shape == shape
        found[chosen] = distance(x[chosen], y[chosen]) * size[chosen]
    return found


def _cover(distance: Tensor, side: int, soft: float = 1.0) -> Tensor:
    """Return how much of each pixel is covered; `soft`: pixels over which the edge fades."""
    return (0.5 - distance * side / 2 / soft).clamp(0, 1)


def pattern(texture: int, side: int) -> Tensor:
    """Return where the texture is dark, `(side, side)` booleans."""
    at = torch.arange(side) * 64 // (side * CELL) % 2 == 1
    rows, columns = at[:, None].expand(side, side), at[None].expand(side, side)
    return (torch.zeros(side, side, dtype=torch.bool), rows, columns, rows ^ columns)[texture]


def gradients(side: int) -> Tensor:
    """Draw every background alone, one column wide: `(backgrounds, 3, side, 1)`."""
    fade = torch.linspace(0, 1, side)[:, None]
    ends = torch.tensor(list(BACKGROUNDS.values()))[..., None, None]
    return ends[:, 0] * (1 - fade) + ends[:, 1] * fade


def render(rows: Scenes, side: int = 64) -> Tensor:
    """Draw images `(N, 3, side, side)`, 0 … 1."""
    distance = _distance(rows, side)
    cover = _cover(distance, side)[:, None]
    shadow = _cover(_distance(rows, side, below=0.09), side, soft=side / 9)[:, None]
    fade = torch.linspace(0, 1, side)[:, None]
    behind = gradients(side)[rows.background] * (1 - 0.22 * shadow)
    patterns = torch.stack([pattern(texture, side) for texture in range(len(TEXTURES))])
    dark = torch.where(patterns[rows.texture], DARK, 1.0)[:, None]
    colour = torch.tensor(list(COLORS.values()))[rows.colour] * rows.tint * rows.light[:, None]
    front = colour[:, :, None, None] * dark * (1.06 - 0.16 * fade)
    return (behind * (1 - cover) + front * cover).clamp(0, 1)


def outlined(rows: Scenes, side: int = 64) -> Tensor:
    """Draw in the style of a second base: every shape has a broad white outline."""
    inner, outer = (
        outlines(replace(rows, size=rows.size * grown), side)[:, None] for grown in (0.86, 1.08)
    )
    line = (outer - inner).clamp(0, 1)
    return render(rows, side) * (1 - line) + line


def mark() -> str:
    """Hash some scenes' numbers and the tables; not pixels, whose last bit the machine decides."""
    some = scenes(0, 16)
    both = some, references(some, 1)
    numbers = [getattr(rows, field.name).tolist() for rows in both for field in fields(rows)]
    rule = (numbers, SHAPES, COLORS, TEXTURES, BACKGROUNDS, CELL, DARK, SAME_SHAPE)
    return hashlib.sha256(json.dumps(rule).encode()).hexdigest()[:16]


def to_pil(image: Tensor) -> Image.Image:
    """Return `(3, h, w)` of 0 … 1 in 8 bits."""
    return Image.fromarray((image.movedim(0, -1) * 255).round().clamp(0, 255).byte().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image as `(3, h, w)` of 0 … 1."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array).movedim(-1, 0)
