"""The slow explicit truth that sampling is compared with, and what to sample."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch

from tests.sampling import regions
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
def comparison(pack) -> type:
    from tests.sampling.truth import Comparison

    return Comparison


@pytest.fixture(scope="session")
def guidances(pack) -> ModuleType:
    from tests.sampling import guidances

    return guidances


@pytest.fixture(params=GUIDANCES)
def guidance(request, guidances):
    """A function of a model and three conditionings that makes a guider."""
    return getattr(guidances, request.param)


@pytest.fixture(params=LAYOUTS)
def regional(request, small):
    """A positive and a negative conditioning of several regions."""
    return regions.texts(small, request.param)


@pytest.fixture(params=["one call", "split for memory"])
def memory(request, host, monkeypatch):
    """Conditionings share UNet calls, or get one each, as where memory is short."""
    if request.param == "split for memory":
        _free(monkeypatch, 0)


@pytest.fixture(scope="session")
def truth(pack):
    from tests.sampling import truth

    return truth


@pytest.fixture
def windowed(host):
    """The host's context windows over a batch of frames: 4 at a time, 2 shared."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    known = inspect.signature(ContextWindowsManualNode.execute).parameters

    def windowed(model, schedule="standard_static", fix=True):
        return ContextWindowsManualNode.execute(
            model=model,
            context_length=4,
            context_overlap=2,
            context_schedule=schedule,
            context_stride=1,
            closed_loop=False,
            fuse_method="pyramid",
            dim=0,
            freenoise=False,
            **({"causal_window_fix": fix} if "causal_window_fix" in known else {}),
        ).args[0]

    return windowed


@pytest.fixture
def empty_text(small):
    """The PerpNeg node, which brings the text of its own past the guider."""
    from comfy_extras.nodes_perpneg import PerpNeg

    def empty_text(model, text):
        return PerpNeg.execute(model, text, 1.0).args[0]

    return empty_text


@pytest.fixture
def enlarging(host):
    """A sampler that enlarges the latents to twice their size."""
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    return SamplerLCMUpscale.execute(2.0, -1, "bilinear").args[0]


@pytest.fixture
def traced(host):
    """The steps of the host's node for compiling a model, with a backend that traces only."""
    from comfy_extras import nodes_torch_compile as node

    def traced(model):
        clone = model.clone()
        options = {"guard_filter_fn": node.skip_torch_compile_dict}
        node.set_torch_compile_wrapper(model=clone, backend="eager", options=options)
        return clone

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield traced
    torch._dynamo.reset()


def _free(monkeypatch, amount):
    """Have the host find so many bytes free where it splits conditionings."""
    from comfy import model_management
    from comfy.model_patcher import ModelPatcher

    if hasattr(ModelPatcher, "get_free_memory"):
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: amount)
    else:  # before 0.23
        monkeypatch.setattr(model_management, "get_free_memory", lambda *_, **__: amount)


@pytest.fixture(autouse=True)
def _as_in_the_host(host, monkeypatch):
    """Without gradients, and with memory for all of a step in one call, whatever else runs."""
    _free(monkeypatch, 2**40)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
