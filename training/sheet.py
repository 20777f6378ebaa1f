"""A contact sheet of a validation: the reference, what becomes of it as λ grows, row by row."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, GAP, MARGIN = 256, 12, 32
TITLE, HEADER, LABEL = 56, 60, 34  # heights
PAPER, INK, FAINT, EMPTY = (250, 249, 246), (32, 33, 36), (112, 112, 116), (214, 212, 206)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """Heading of a column, and what stands small beneath."""

    heading: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Label above a row, and its pictures; None is drawn as an empty cell."""

    label: str
    pictures: Sequence[Image.Image | None]


def contact_sheet(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Image.Image:
    """Raises ValueError for a row that has not one picture a column."""
    for row in rows:
        if len(row.pictures) != len(columns):
            raise ValueError(
                f"Row '{row.label}' holds {len(row.pictures)} pictures; the sheet has "
                f"{len(columns)} columns."
            )
    cells = [[_fitting(picture) for picture in row.pictures] for row in rows]
    heights = [max(cell.height for cell in row) for row in cells]
    width = 2 * MARGIN + len(columns) * (CELL + GAP) - GAP
    height = TITLE + HEADER + sum(heights) + len(rows) * (LABEL + GAP) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (MARGIN, 20), title, 26, INK, width - 2 * MARGIN)
    for number, column in enumerate(columns):
        left = MARGIN + number * (CELL + GAP)
        _text(draw, (left, TITLE + 6), column.heading, 20, INK, CELL)
        _text(draw, (left, TITLE + 32), column.note, 16, FAINT, CELL)
    top = TITLE + HEADER
    for row, drawn, tallest in zip(rows, cells, heights, strict=True):
        _text(draw, (MARGIN, top + 8), row.label, 18, INK, width - 2 * MARGIN)
        for place, cell in enumerate(drawn):
            left = MARGIN + place * (CELL + GAP) + (CELL - cell.width) // 2
            sheet.paste(cell, (left, top + LABEL + (tallest - cell.height) // 2))
        top += LABEL + tallest + GAP
    return sheet


def _fitting(picture: Image.Image | None) -> Image.Image:
    """The whole picture, nothing cut off, as large as fits a square."""
    if picture is None:
        return Image.new("RGB", (CELL, CELL), EMPTY)
    return ImageOps.contain(picture.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS)


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    room: int,
) -> None:
    """One line; what does not fit ends in an ellipsis."""
    font = ImageFont.load_default(size)
    line = " ".join(text.split())
    cut = len(line)
    while cut and draw.textlength(line, font=font) > room:
        cut -= 1
        line = line[:cut].rstrip() + "…"
    draw.text(at, line, font=font, fill=colour)


def save(sheet: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all. A full disk is reported in the log: it must not end a
    training."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        sheet.save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        logger.error("The contact sheet '%s' could not be written: %s", path, error)
        temporary.unlink(missing_ok=True)


def show(sheet: Image.Image, accelerator: Accelerator, step: int) -> None:
    """Give the sheet to those of a run's trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(sheet)[None]
            tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
        elif tracker.name in ("wandb", "swanlab"):
            tracker.log_images({"validation": [sheet]}, step=step)
