"""Families of models, known by the width of their text states and their number of layers."""

from __future__ import annotations

_FAMILIES = {(768, 16): "SD1.5", (1024, 16): "SD2", (2048, 70): "SDXL", (1280, 44): "SDXL Refiner"}


def family(context_dim: int, count: int) -> str | None:
    """Name of the family with `count` cross-attention layers over text states of that width."""
    return _FAMILIES.get((context_dim, count))


def describe(context_dim: int, count: int) -> str:
    """The same for messages, whether it has a name or not."""
    sizes = f"{count} cross-attention layers over {context_dim}-wide text states"
    name = family(context_dim, count)
    return f"{name} ({sizes})" if name else f"a model of {sizes}"
