"""Pictures side by side, with words at the edges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 6
_GROUND, _INK = (32, 34, 40), (222, 224, 230)


def draw_grid(
    cells: Sequence[Sequence[Tensor]], columns: Sequence[str], rows: Sequence[str]
) -> Tensor:
    """Rows of pictures `(H, W, C)`, values 0 … 1, under the words of the columns and beside those
    of the rows: `(1, H', W', 3)`. Small pictures are enlarged by whole numbers, so that the words
    have room. Raises ValueError unless all pictures have one size."""
    sizes = sorted({tuple(cell.shape[:2]) for row in cells for cell in row})
    if len(sizes) > 1:
        raise ValueError(
            f"The pictures are of {' and '.join(f'{w}×{h}' for h, w in sizes)} pixels; expected "
            "all of one size. Draw pictures of other sizes in a grid of their own."
        )
    height, width = sizes[0]
    factor = max(1, 160 // width)
    height, width = factor * height, factor * width
    font = max(13, width // 14)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    longest = max(ruler.textlength(word, font_size=font) for word in rows)
    left, top = max(6 * font, math.ceil(longest) + 2 * _GAP), 2 * font
    sheet = Image.new(
        "RGB", (left + len(columns) * (width + _GAP), top + len(rows) * (height + _GAP)), _GROUND
    )
    pen = ImageDraw.Draw(sheet)
    for x, word in enumerate(columns):
        middle = left + x * (width + _GAP) + width // 2
        pen.text((middle, top // 2), word, fill=_INK, anchor="mm", font_size=font)
    for y, word in enumerate(rows):
        middle = top + y * (height + _GAP) + height // 2
        pen.text((left - _GAP, middle), word, fill=_INK, anchor="rm", font_size=font)
        for x, cell in enumerate(cells[y]):
            colours = (
                cell[..., :3].float().expand(-1, -1, 3)
            )  # of grey ones, which have one channel
            pixels = (colours.clamp(0, 1) * 255).round().byte().cpu().numpy()
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + x * (width + _GAP), top + y * (height + _GAP)))
    return torch.from_numpy(np.asarray(sheet, np.float32) / 255)[None]
