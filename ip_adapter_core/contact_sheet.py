"""Draw images side by side with words: the grid node, validation, demo and evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

Color = tuple[int, int, int]


class Colors(NamedTuple):
    """Of the ground, of words, of less important words, and of cells without an image."""

    paper: Color
    ink: Color
    faint: Color
    empty: Color


LIGHT = Colors((250, 249, 246), (32, 33, 36), (112, 112, 116), (214, 212, 206))
DARK = Colors((32, 34, 40), (222, 224, 230), (150, 152, 158), (70, 74, 84))


@dataclass(frozen=True)
class Column:
    """Heading of a column, and what stands small beneath."""

    heading: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Images with a label and a caption under each; None is drawn as an empty cell."""

    label: str
    images: Sequence[Image.Image | None]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Layout:
    """Width and height of a cell in pixels, colors, and the width of labels beside their rows.

    Without `label_width`, labels stand above their rows. Every other size follows from `cell`.
    """

    cell: tuple[int, int] = (256, 256)
    colors: Colors = LIGHT
    label_width: int = 0

    @property
    def font(self) -> int:
        """Return the size of labels in pixels."""
        return max(13, self.cell[0] // 14)

    @property
    def gap(self) -> int:
        """Return the distance between cells."""
        return max(6, self.cell[0] // 21)

    @property
    def line(self) -> int:
        """Return the height of a line of words."""
        return 2 * self.font

    @property
    def margin(self) -> int:
        """Return the width of the bare edge."""
        return self.font


def contact_sheet(
    rows: Sequence[Row],
    columns: Sequence[Column] = (),
    *,
    title: str = "",
    notes: Sequence[str] = (),
    layout: Layout | None = None,
) -> Image.Image:
    """Draw title, headings, rows and notes, from top to bottom, each where it is given.

    Images are shown whole, as large as a cell allows; words that have no room end in an ellipsis.

    Raises:
        ValueError: A row has not one image a column.
    """
    for row in rows:
        if columns and len(row.images) != len(columns):
            raise ValueError(
                f"Row '{row.label}' holds {len(row.images)} images; the sheet has "
                f"{len(columns)} columns."
            )
    layout = layout or Layout()
    colors, line, gap = layout.colors, layout.line, layout.gap
    wide = layout.cell[0]
    cells = [[_fit(image, layout) for image in row.images] for row in rows]
    heights = [max(cell.height for cell in row) for row in cells]
    above = 0 if layout.label_width else line
    below = line if any(row.captions for row in rows) else 0
    lines = bool(title) + bool(columns) + any(column.note for column in columns) + len(notes)
    left = layout.margin + layout.label_width
    size = (
        left + max(map(len, cells)) * (wide + gap) - gap + layout.margin,
        lines * line + sum(heights) + len(rows) * (above + below + gap) + layout.margin,
    )
    sheet = Image.new("RGB", size, colors.paper)
    pen = ImageDraw.Draw(sheet)
    room = size[0] - 2 * layout.margin
    centers = [left + number * (wide + gap) + wide // 2 for number in range(max(map(len, cells)))]

    def write(
        x: int, y: int, text: str, color: Color, anchor: str, room: int = wide, scale: float = 1
    ) -> None:
        font_size = layout.font * scale
        pen.text(
            (x, y), _shortened(text, font_size, room), color, anchor=anchor, font_size=font_size
        )

    top = 0
    if title:
        write(layout.margin, line // 2, title, colors.ink, "lm", room, 1.4)
        top += line
    for lines_of, color, scale in (
        ([column.heading for column in columns], colors.ink, 1),
        ([column.note for column in columns], colors.faint, 0.85),
    ):
        if any(lines_of):
            for center, text in zip(centers, lines_of, strict=True):
                write(center, top + line // 2, text, color, "mm", scale=scale)
            top += line
    for row, drawn, height in zip(rows, cells, heights, strict=True):
        if layout.label_width:
            write(left - gap, top + height // 2, row.label, colors.ink, "rm", left)
        else:
            write(layout.margin, top + line // 2, row.label, colors.ink, "lm", room)
        top += above
        for center, cell in zip(centers, drawn, strict=False):
            sheet.paste(cell, (center - cell.width // 2, top + (height - cell.height) // 2))
        for center, text in zip(centers, row.captions, strict=False):
            write(center, top + height + line // 2, text, colors.ink, "mm")
        top += height + below + gap
    for note in notes:
        write(layout.margin, top + line // 2, note, colors.faint, "lm", room, 0.85)
        top += line
    return sheet


def _fit(image: Image.Image | None, layout: Layout) -> Image.Image:
    if image is None:
        return Image.new("RGB", layout.cell, layout.colors.empty)
    return ImageOps.contain(image.convert("RGB"), layout.cell, Image.Resampling.LANCZOS)


def _shortened(text: str, font_size: float, room: int) -> str:
    line = " ".join(text.split())
    cut = len(line)
    while cut and _length(line, font_size) > room:
        cut -= 1
        line = line[:cut].rstrip() + "…"
    return line


def _length(text: str, font_size: float) -> float:
    return ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text, font_size=font_size)


def draw_grid(
    cells: Sequence[Sequence[Tensor]], columns: Sequence[str], rows: Sequence[str]
) -> Tensor:
    """Draw rows of images `(H, W, C)`, values 0 … 1, between headings and labels.

    Small images are enlarged by whole numbers, so that the words have room.

    Returns:
        `(1, H', W', 3)`.

    Raises:
        ValueError: The images are not of one size.
    """
    sizes = sorted({tuple(cell.shape[:2]) for row in cells for cell in row})
    if len(sizes) > 1:
        raise ValueError(
            f"The pictures are of {' and '.join(f'{w}×{h}' for h, w in sizes)} pixels; expected "
            "all of one size. Draw pictures of other sizes in a grid of their own."
        )
    height, width = sizes[0]
    factor = max(1, 160 // width)
    layout = Layout((factor * width, factor * height), DARK)
    longest = max(_length(label, layout.font) for label in rows)
    layout = Layout(layout.cell, DARK, math.ceil(longest) + layout.gap)

    def image(cell: Tensor) -> Image.Image:
        channels = cell[..., :3].float().expand(-1, -1, 3)  # grey images have one
        pixels = (channels.clamp(0, 1) * 255).round().byte().cpu().numpy()
        return Image.fromarray(pixels).resize(layout.cell, Image.Resampling.NEAREST)

    sheet = contact_sheet(
        [Row(label, [image(cell) for cell in row]) for label, row in zip(rows, cells, strict=True)],
        [Column(heading) for heading in columns],
        layout=layout,
    )
    return torch.from_numpy(np.asarray(sheet, np.float32) / 255)[None]
