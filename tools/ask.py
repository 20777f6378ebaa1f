"""What the demo asks for, whoever makes the pictures."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Ask:
    """One picture for each weight (λ); ``size`` in pixels, a multiple of 8."""

    reference: Image.Image
    prompt: str
    negative: str
    weights: tuple[float, ...]
    size: int
    steps: int
    guidance: float
    seed: int
