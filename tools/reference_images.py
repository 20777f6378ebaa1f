"""Draw the reference images: scenes, faces, masks and an outline, 512 px, always the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 512
_SCALE = 2  # drawn larger, then reduced: smooth edges
_SIDE = SIZE * _SCALE
Color = tuple[int, int, int]
EYES, NOSE, MOUTH = (38, 62, 148), (206, 112, 72), (186, 40, 58)
"""Colours of the parts of every face, by which they can be found."""


def _gradient(stops: Sequence[Color]) -> Image.Image:
    """Return a vertical gradient through colors at equal distances."""
    at = np.linspace(0, len(stops) - 1, _SIDE)
    columns = [np.interp(at, range(len(stops)), [stop[c] for stop in stops]) for c in range(3)]
    rows = np.stack(columns, axis=-1)[:, None].repeat(_SIDE, axis=1)
    return Image.fromarray(rows.round().astype(np.uint8))


def _wave(level: float, height: float, waves: float, phase: float) -> list[tuple[float, float]]:
    """Return the outline of a hill or swell, filled below it; all in fractions of the side."""
    xs = np.linspace(0, 1, 200)
    ys = level - height * (
        np.sin(math.tau * waves * xs + phase) + 0.4 * np.sin(math.tau * 2.3 * waves * xs)
    )
    top = [(float(x) * _SIDE, float(y) * _SIDE) for x, y in zip(xs, ys, strict=True)]
    return [*top, (_SIDE, _SIDE), (0, _SIDE)]


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Color | str) -> None:
    box = [(x - radius) * _SIDE, (y - radius) * _SIDE, (x + radius) * _SIDE, (y + radius) * _SIDE]
    pen.ellipse(box, fill=fill)


def sunset() -> Image.Image:
    """Draw layered hills under an evening sky."""
    image = _gradient([(38, 30, 84), (140, 60, 122), (244, 128, 94), (255, 214, 140)])
    pen = ImageDraw.Draw(image)
    _disc(pen, 0.64, 0.50, 0.12, (255, 240, 196))
    hills = [(0.66, 0.05, 1.3, 0.4), (0.76, 0.06, 1.0, 2.1), (0.88, 0.05, 1.6, 4.0)]
    colors: list[Color] = [(158, 72, 110), (96, 46, 96), (44, 28, 66)]
    for hill, color in zip(hills, colors, strict=True):
        pen.polygon(_wave(*hill), fill=color)
    return image


def lemons() -> Image.Image:
    """Draw lemons and leaves on a teal table."""
    image = _gradient([(22, 132, 138), (30, 154, 152), (60, 182, 170)])
    pen = ImageDraw.Draw(image)
    for x, y, radius in ((0.32, 0.38, 0.19), (0.66, 0.56, 0.23), (0.30, 0.76, 0.15)):
        _disc(pen, x + 0.02, y + 0.03, radius, (16, 104, 112))
        _disc(pen, x, y, radius, (238, 176, 22))
        _disc(pen, x - radius * 0.1, y - radius * 0.1, radius * 0.86, (252, 212, 44))
        _disc(pen, x - radius * 0.35, y - radius * 0.38, radius * 0.22, (255, 244, 176))
    for x, y, angle in ((0.56, 0.24, 20), (0.83, 0.30, -40), (0.62, 0.88, 65)):
        leaf = Image.new("L", (_SIDE, _SIDE))
        box = [(x - 0.13) * _SIDE, (y - 0.05) * _SIDE, (x + 0.13) * _SIDE, (y + 0.05) * _SIDE]
        ImageDraw.Draw(leaf).ellipse(box, fill=255)
        leaf = leaf.rotate(angle, center=(x * _SIDE, y * _SIDE))
        image.paste((40, 110, 56), mask=leaf)
    return image


def harbour() -> Image.Image:
    """Draw a sailing boat on a blue sea."""
    image = _gradient([(116, 186, 232), (188, 226, 240), (244, 244, 226)])
    pen = ImageDraw.Draw(image)
    _disc(pen, 0.20, 0.20, 0.07, (255, 250, 220))
    pen.polygon(_wave(0.66, 0.010, 2.0, 1.0), fill=(36, 128, 180))
    boat = {
        (232, 70, 60): [(0.50, 0.14), (0.50, 0.62), (0.24, 0.62)],
        (250, 248, 240): [(0.53, 0.24), (0.53, 0.62), (0.74, 0.62)],
        (120, 62, 40): [(0.20, 0.66), (0.80, 0.66), (0.70, 0.77), (0.30, 0.77)],
    }
    for color, points in boat.items():
        pen.polygon([(x * _SIDE, y * _SIDE) for x, y in points], fill=color)
    pen.polygon(_wave(0.78, 0.014, 3.0, 0.2), fill=(24, 100, 156))
    pen.polygon(_wave(0.90, 0.018, 2.2, 2.6), fill=(16, 74, 126))
    return image


def face(x: float, skin: Color, hair: Color, ground: Color) -> Image.Image:
    """Draw head and shoulders of a person, the head at `x`."""
    image = _gradient([ground, (244, 240, 232)])
    pen = ImageDraw.Draw(image)

    def oval(left: float, top: float, right: float, bottom: float, fill: Color | str) -> None:
        box = (x + left, top, x + right, bottom)
        pen.ellipse([part * _SIDE for part in box], fill=fill)

    oval(-0.27, 0.10, 0.27, 0.72, hair)
    oval(-0.38, 0.78, 0.38, 1.30, ground)
    oval(-0.09, 0.62, 0.09, 0.86, skin)
    oval(-0.20, 0.18, 0.20, 0.74, skin)
    for side in (-0.09, 0.09):
        oval(side - 0.050, 0.40, side + 0.050, 0.45, "white")
        oval(side - 0.024, 0.40, side + 0.024, 0.45, EYES)
        oval(side - 0.055, 0.36, side + 0.055, 0.375, hair)
    oval(-0.025, 0.51, 0.025, 0.545, NOSE)
    oval(-0.075, 0.60, 0.075, 0.64, MOUTH)
    return image


def mask() -> Image.Image:
    """Draw a mask, white where to act: a soft disc in the middle of black."""
    image = Image.new("RGB", (_SIDE, _SIDE))
    _disc(ImageDraw.Draw(image), 0.5, 0.5, 0.3, "white")
    return image.filter(ImageFilter.GaussianBlur(8 * _SCALE))


def left_half() -> Image.Image:
    """Draw a mask, white in the left half."""
    image = Image.new("RGB", (_SIDE, _SIDE))
    ImageDraw.Draw(image).rectangle((0, 0, _SIDE // 2, _SIDE), "white")
    return image.filter(ImageFilter.GaussianBlur(8 * _SCALE))


def structure() -> Image.Image:
    """Draw the boat's outline, white on black, as an edge detector gives it."""
    soft = np.asarray(harbour().filter(ImageFilter.GaussianBlur(2)), dtype=float)
    steep = np.hypot(*np.gradient(soft, axis=(0, 1))).max(axis=-1) > 6
    return Image.fromarray((steep * 255).astype(np.uint8)).convert("RGB")


SCENES: dict[str, Callable[[], Image.Image]] = {
    "reference.png": sunset,
    "reference_2.png": lemons,
    "reference_3.png": harbour,
    "face.png": partial(face, 0.52, (244, 200, 166), (84, 48, 30), (88, 138, 190)),
    "face_2.png": partial(face, 0.46, (150, 98, 66), (30, 26, 32), (96, 150, 104)),
    "mask.png": mask,
    "mask_left.png": left_half,
    "structure.png": structure,
}


def draw(name: str) -> Image.Image:
    """Draw one of `SCENES`, 512 × 512 RGB."""
    return SCENES[name]().convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
