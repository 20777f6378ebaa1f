"""What the demo asks for, whoever makes the pictures."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Shot:
    """One picture: ``weight`` is λ."""

    weight: float
    text: str


@dataclass(frozen=True)
class Row:
    """A reference, its file in ``input/``, and the pictures to draw beside it. ``title`` says what
    changes from one to the next."""

    title: str
    file: str
    reference: Image.Image
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Ask:
    """Every row with the same settings; ``size`` in pixels, a multiple of 8."""

    rows: tuple[Row, ...]
    negative: str
    size: int
    steps: int
    guidance: float
    seed: int
