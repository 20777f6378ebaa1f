"""The reference implementations beside the host, on shared weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def _load(name: str) -> ModuleType:
    """A helper beside this file. It imports the host, so it can only be loaded by a fixture."""
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ip_adapter_reference_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def unets(host, pack) -> ModuleType:
    """ComfyUI's and diffusers' UNets around the same weights."""
    return _load("unets")


@pytest.fixture(scope="session")
def adapters(unets) -> ModuleType:
    """Random adapters for those UNets, and prompts for those adapters."""
    return _load("adapters")


@pytest.fixture(scope="session")
def both(adapters) -> ModuleType:
    """What ComfyUI with this pack's nodes, and what diffusers make of the same prompts."""
    return _load("both")


@pytest.fixture(scope="module")
def pairs(unets, adapters, both) -> dict[str, Any]:
    """Both programs around a UNet of each family that has all layers but few channels."""
    encoder = adapters.SMALL_ENCODER
    return {name: both.Pair(family, encoder) for name, family in unets.SMALL.items()}


@pytest.fixture(scope="session")
def encoders(host, pack) -> ModuleType:
    """ComfyUI's and transformers' image encoders around the same weights."""
    return _load("encoders")


@pytest.fixture(autouse=True)
def _one_thread():
    """Layers this small take far longer when two threads wait for each other in them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
