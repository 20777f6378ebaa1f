"""The reference implementations beside the host, on shared weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def both(pack) -> ModuleType:
    """What ComfyUI with this pack's nodes, and what diffusers make of the same prompts."""
    from tests.reference import both

    return both


@pytest.fixture(scope="module")
def pairs(both) -> dict[str, Any]:
    """Both programs around a UNet of each family that has all layers but few channels."""
    return {name: both.Pair(family, both.SMALL_ENCODER) for name, family in both.SMALL.items()}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
