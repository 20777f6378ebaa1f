"""What the demo renders, whoever makes the images: ComfyUI or diffusers."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Render:
    """One image to render: `weight` is λ."""

    weight: float
    text: str


@dataclass(frozen=True)
class DemoRow:
    """A reference, its file in `input/`, and what to render beside it.

    `title` says what changes from one to the next.
    """

    title: str
    file: str
    reference: Image.Image
    renders: tuple[Render, ...]


@dataclass(frozen=True)
class DemoRequest:
    """Every row with the same settings; `size` in pixels, a multiple of 8."""

    rows: tuple[DemoRow, ...]
    negative: str
    size: int
    steps: int
    guidance: float
    seed: int
