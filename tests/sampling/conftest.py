"""The slow explicit truth that sampling is compared with, and what to sample."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.support.sets import nightly

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
    "masks bounding areas",
    "area over all",
    "negative area",
    "default beside area",
    *nightly("masks", "equal areas", "default"),
)


@pytest.fixture(scope="session")
def truth(pack) -> ModuleType:
    from tests.sampling import truth

    return truth


@pytest.fixture(scope="session")
def guidances(pack) -> ModuleType:
    from tests.sampling import guidances

    return guidances


@pytest.fixture(scope="session")
def regions() -> ModuleType:
    from tests.sampling import regions

    return regions


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
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
