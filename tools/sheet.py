"""A contact sheet: references down, and beside each what becomes of it from render to render."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from tools.demo import DemoRow

CELL, GAP, MARGIN, HEAD, TITLE, LABEL, FOOT = 200, 16, 40, 84, 34, 44, 26
PAPER, INK, FAINT, RULE = (250, 249, 246), (32, 33, 36), (120, 120, 124), (222, 220, 214)


def _text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, **kw) -> None:
    draw.text(at, text, font=ImageFont.load_default(size), **{"fill": INK, **kw})


def _weight(draw: ImageDraw.ImageDraw, centre: float, top: float, weight: float) -> None:
    """The label ``λ = weight``; the font that PIL brings has no λ, so it is two strokes."""
    size, text = 20, f"= {weight:g}"
    length = draw.textlength(text, font=ImageFont.load_default(size))
    glyph, height = size * 0.5, size * 0.74
    left, base = centre - (length + glyph + 8) / 2, top + size * 0.98
    across = [(0.0, 1.0), (0.18, 1.0), (0.30, 0.86), (0.78, 0.08), (0.90, 0.0), (1.0, 0.0)]
    leg = [(0.46, 0.60), (0.04, 0.0)]
    for stroke in (across, leg):
        points = [(left + x * glyph, base - y * height) for x, y in stroke]
        draw.line(points, fill=INK, width=2, joint="curve")
    _text(draw, (left + glyph + 8, top), text, size)


def _placed(sheet: Image.Image, picture: Image.Image, left: int, top: int) -> None:
    """Cut the picture's centre to a square cell with rounded corners."""
    side = min(picture.size)
    x, y = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((x, y, x + side, y + side))
    cell = square.resize((CELL, CELL), Image.Resampling.BICUBIC)
    corners = Image.new("L", (2 * CELL, 2 * CELL))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 2 * CELL - 1, 2 * CELL - 1), 20, fill=255)
    sheet.paste(cell, (left, top), corners.resize((CELL, CELL), Image.Resampling.LANCZOS))


def contact_sheet(
    rows: Sequence[DemoRow],
    pictures: Sequence[Sequence[Image.Image]],
    notes: Sequence[str] = (),
) -> Image.Image:
    """Draw each row's title, reference and `pictures`, one a render; `notes` stand below.

    Under an image stands λ where that changes, and the text where that does.
    """
    most = max(len(row.renders) for row in rows)
    width = 2 * MARGIN + (1 + most) * (CELL + GAP) + GAP
    each = TITLE + CELL + LABEL
    sheet = Image.new("RGB", (width, HEAD + each * len(rows) + FOOT * len(notes) + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (MARGIN, 20), "IP-Adapter: a picture as a prompt", 28)
    for number, (row, drawn) in enumerate(zip(rows, pictures, strict=True)):
        top = HEAD + each * number
        _text(draw, (MARGIN, top), row.title, 18, fill=FAINT)
        top += TITLE
        _placed(sheet, row.reference, MARGIN, top)
        _text(draw, (MARGIN + CELL / 2, top + CELL + 8), "reference", 20, anchor="ma")
        rule = MARGIN + CELL + GAP
        draw.line((rule, top, rule, top + CELL), fill=RULE, width=2)
        by_text = len({render.text for render in row.renders}) > 1
        for i, (render, picture) in enumerate(zip(row.renders, drawn, strict=True)):
            left = MARGIN + (i + 1) * (CELL + GAP) + GAP
            _placed(sheet, picture, left, top)
            centre = left + CELL / 2
            if by_text:
                text = f'"{render.text}"' if render.text else "no text"
                _text(draw, (centre, top + CELL + 8), text, 20, anchor="ma")
            else:
                _weight(draw, centre, top + CELL + 8, render.weight)
    for i, note in enumerate(notes):
        _text(draw, (MARGIN, HEAD + each * len(rows) + 4 + FOOT * i), note, 16, fill=FAINT)
    return sheet
