"""A contact sheet: the reference, and what becomes of the text as λ grows."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, MARGIN, HEAD, LABEL, FOOT = 320, 20, 48, 104, 56, 28
PAPER, INK, FAINT, RULE = (250, 249, 246), (32, 33, 36), (120, 120, 124), (222, 220, 214)


def _text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, **kw) -> None:
    draw.text(at, text, font=ImageFont.load_default(size), **{"fill": INK, **kw})


def _weight(draw: ImageDraw.ImageDraw, centre: float, top: float, weight: float) -> None:
    """The label ``λ = weight``; the font that PIL brings has no λ, so it is two strokes."""
    size, text = 24, f"= {weight:g}"
    length = draw.textlength(text, font=ImageFont.load_default(size))
    glyph, height = size * 0.5, size * 0.74
    left, base = centre - (length + glyph + 8) / 2, top + size * 0.98
    across = [(0.0, 1.0), (0.18, 1.0), (0.30, 0.86), (0.78, 0.08), (0.90, 0.0), (1.0, 0.0)]
    leg = [(0.46, 0.60), (0.04, 0.0)]
    for stroke in (across, leg):
        points = [(left + x * glyph, base - y * height) for x, y in stroke]
        draw.line(points, fill=INK, width=2, joint="curve")
    _text(draw, (left + glyph + 8, top), text, size)


def _placed(sheet: Image.Image, picture: Image.Image, left: int) -> None:
    """Cut the picture's centre to a square cell with rounded corners."""
    side = min(picture.size)
    x, y = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((x, y, x + side, y + side))
    cell = square.resize((CELL, CELL), Image.Resampling.LANCZOS)
    corners = Image.new("L", (2 * CELL, 2 * CELL))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 2 * CELL - 1, 2 * CELL - 1), 20, fill=255)
    sheet.paste(cell, (left, HEAD), corners.resize((CELL, CELL), Image.Resampling.LANCZOS))


def contact_sheet(
    reference: Image.Image,
    pictures: Sequence[tuple[float, Image.Image]],
    prompt: str,
    notes: Sequence[str] = (),
) -> Image.Image:
    """Reference, then ``pictures`` (λ and picture each) in one row; ``notes`` stand below."""
    count = 1 + len(pictures)
    width = 2 * MARGIN + count * CELL + count * GAP + GAP
    height = HEAD + CELL + LABEL + FOOT * len(notes) + MARGIN // 2
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (MARGIN, 24), "IP-Adapter", 30)
    _text(draw, (MARGIN, 64), f'a picture as a prompt, beside the text "{prompt}"', 19, fill=FAINT)
    _placed(sheet, reference, MARGIN)
    _text(draw, (MARGIN + CELL / 2, HEAD + CELL + 14), "reference", 24, anchor="ma")
    rule = MARGIN + CELL + GAP
    draw.line((rule, HEAD, rule, HEAD + CELL), fill=RULE, width=2)
    for i, (weight, picture) in enumerate(pictures):
        left = MARGIN + (i + 1) * (CELL + GAP) + GAP
        _placed(sheet, picture, left)
        _weight(draw, left + CELL / 2, HEAD + CELL + 14, weight)
    for i, note in enumerate(notes):
        _text(draw, (MARGIN, HEAD + CELL + LABEL + FOOT * i), note, 17, fill=FAINT)
    return sheet
