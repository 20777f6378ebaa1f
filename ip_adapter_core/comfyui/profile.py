"""A picture of layer weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..layer_weights import LayerKey, forward, layer_names

WIDTH, HEIGHT = 768, 320
_MARGIN, _LABELS = 44, 92
_GROUND, _INK, _GRID = (32, 34, 40), (222, 224, 230), (70, 74, 84)
_COLORS = {"input": (92, 158, 235), "middle": (236, 190, 84), "output": (112, 200, 128)}
_COLORS |= {"double": _COLORS["input"], "single": _COLORS["output"]}


def draw_profile(weights: Sequence[float], layers: Sequence[LayerKey]) -> Tensor:
    """One bar a layer, in the order in which the UNet runs through them: `(1, H, W, 3)`, 0 … 1."""
    table = dict(zip(layers, weights, strict=True))
    ordered = forward(layers)
    names = layer_names(ordered)
    low, high = min(0.0, *table.values()), max(1.0, *table.values())
    sheet = Image.new("RGB", (WIDTH, HEIGHT), _GROUND)
    pen = ImageDraw.Draw(sheet)
    bottom = HEIGHT - _LABELS
    step = (WIDTH - _MARGIN - 16) / len(ordered)

    def y(weight: float) -> float:
        return bottom - (weight - low) / (high - low) * (bottom - 20)

    for weight in sorted({low, 0.0, 1.0, high}):
        pen.line([(_MARGIN, y(weight)), (WIDTH - 16, y(weight))], fill=_GRID)
        pen.text((_MARGIN - 6, y(weight)), f"{weight:g}", fill=_INK, anchor="rm", font_size=13)
    labelled = 0.0  # where the next label has room
    for number, (layer, name) in enumerate(zip(ordered, names, strict=True)):
        left = _MARGIN + number * step
        ends = sorted((y(0.0), y(table[layer])))
        box = (left + 0.12 * step, ends[0], left + 0.88 * step, max(ends[1], ends[0] + 1))
        pen.rectangle(box, fill=_COLORS[layer[0]])
        if left >= labelled:
            _upright(sheet, name, (round(left + step / 2), bottom + 6))
            labelled = left + 15
    pixels = torch.from_numpy(np.asarray(sheet, np.float32) / 255)
    return pixels[None]


def _upright(sheet: Image.Image, text: str, at: tuple[int, int]) -> None:
    """Text that runs downwards from `at`, its top in the middle."""
    strip = Image.new("RGB", (_LABELS, 16), _GROUND)
    ImageDraw.Draw(strip).text((0, 1), text, fill=_INK, font_size=12)
    sheet.paste(strip.rotate(-90, expand=True), (at[0] - 8, at[1]))
