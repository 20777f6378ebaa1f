"""The reference implementations beside the host, on shared weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def unets(pack, helper) -> ModuleType:
    """ComfyUI's and diffusers' UNets around the same weights."""
    return helper("reference/unets")


@pytest.fixture(scope="session")
def adapters(unets, helper) -> ModuleType:
    """Random adapters for those UNets, and prompts for those adapters."""
    return helper("reference/adapters")


@pytest.fixture(scope="session")
def both(adapters, helper) -> ModuleType:
    """What ComfyUI with this pack's nodes, and what diffusers make of the same prompts."""
    return helper("reference/both")


@pytest.fixture(scope="module")
def pairs(unets, adapters, both) -> dict[str, Any]:
    """Both programs around a UNet of each family that has all layers but few channels."""
    encoder = adapters.SMALL_ENCODER
    return {name: both.Pair(family, encoder) for name, family in unets.SMALL.items()}


@pytest.fixture(scope="session")
def encoders(pack, helper) -> ModuleType:
    """ComfyUI's and transformers' image encoders around the same weights."""
    return helper("reference/encoders")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
