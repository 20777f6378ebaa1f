"""The reference implementations beside the host, on shared weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def unets(pack) -> ModuleType:
    """ComfyUI's and diffusers' UNets around the same weights."""
    from tests.reference import unets

    return unets


@pytest.fixture(scope="session")
def adapters(pack) -> ModuleType:
    """Random adapters for those UNets, and prompts for those adapters."""
    from tests.reference import adapters

    return adapters


@pytest.fixture(scope="session")
def both(pack) -> ModuleType:
    """What ComfyUI with this pack's nodes, and what diffusers make of the same prompts."""
    from tests.reference import both

    return both


@pytest.fixture(scope="module")
def pairs(unets, adapters, both) -> dict[str, Any]:
    """Both programs around a UNet of each family that has all layers but few channels."""
    encoder = adapters.SMALL_ENCODER
    return {name: both.Pair(family, encoder) for name, family in unets.SMALL.items()}


@pytest.fixture(scope="session")
def encoders(pack) -> ModuleType:
    """ComfyUI's and transformers' image encoders around the same weights."""
    from tests.reference import encoders

    return encoders


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
