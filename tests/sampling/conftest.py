"""Small models, and the slow explicit truth that sampling is compared with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

GUIDANCES = (
    "cfg",
    "cfg_1",
    "dual_cfg",
    "dual_cfg_nested",
    "dual_cfg_1",
    "perp_neg",
    "perturbed_attention",
    "self_attention",
)
LAYOUTS = (
    "masks",
    "masks bounding areas",
    "area over all",
    "equal areas",
    "negative area",
    "default",
    "default beside area",
)


def _load(name: str) -> ModuleType:
    """A helper beside this file. It imports the host, so it can only be loaded by a fixture."""
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ip_adapter_tests_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small(host, pack) -> ModuleType:
    return _load("small")


@pytest.fixture(scope="session")
def truth(small) -> ModuleType:
    return _load("truth")


@pytest.fixture(scope="session")
def guidances(small) -> ModuleType:
    return _load("guidances")


@pytest.fixture(scope="session")
def regions() -> ModuleType:
    return _load("regions")


@pytest.fixture(params=GUIDANCES)
def guidance(request, guidances):
    """A function of a model and three conditionings that makes a guider."""
    return getattr(guidances, request.param)


@pytest.fixture(params=LAYOUTS)
def regional(request, small, regions):
    """A positive and a negative conditioning of several regions."""
    return regions.texts(small, request.param)


@pytest.fixture
def split_for_memory(host, monkeypatch):
    """Every conditioning gets a UNet call of its own, as where memory is short."""
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)


@pytest.fixture(autouse=True)
def _as_in_the_host():
    """In inference mode, but in one thread: layers this small take 20 times longer when two
    threads wait for each other in them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
