"""Weights and files for the tests that need no host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

Weights = dict[str, Tensor]


def fill(layout: Mapping[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Random weights that keep activations near 1: fan-in scaling, normalisations around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in layout.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[key] = noise / shape[-1] ** 0.5
        else:
            weights[key] = noise * 0.1 + key.endswith(".weight")
    return weights


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., Weights]:
    return fill
