"""TorchCompileModel: the same picture, traced in one piece, compiled once for many steps."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.sets import nightly

MASK = torch.rand(1, 20, 20)
SETTINGS = {
    "plain": {},
    "mask": {"mask": MASK},
    "per latent": {"combine": "per_latent", "mask": torch.rand(2, 20, 20)},
    "window": {"start_at": 0.35, "end_at": 0.5},
}


@pytest.mark.parametrize(
    "route, setting",
    [
        *(("model", s) for s in ("plain", "per latent", "window")),
        *nightly(("model", "mask"), ("conditioning", "window")),
    ],
)
def test_traced_in_one_piece(small, traced, route, setting):
    given = small.model("two layers"), small.adapter("two layers"), small.images(2)
    patched, *texts = small.applied(route, *given, **SETTINGS[setting])
    at, compiled = (0.3, 0.4, 0.6), traced(patched)
    found, expected = (small.sample(m, *texts, at=at) for m in (compiled, patched))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # With a window: one graph outside it, one inside. Neither is made twice.
    graphs = 2 if setting == "window" else 1
    assert counters["stats"]["unique_graphs"] == graphs
    small.sample(compiled, *texts, at=at)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    if setting == "window":
        outside = small.sample(compiled, *texts, at=(0.6,))
        assert torch.equal(outside, small.sample(given[0], at=(0.6,)))


def test_a_patch_of_another_pack_is_traced_too(small, traced):
    patched = small.apply(small.model("two layers"), small.adapter("two layers"), small.images())
    patched.set_model_attn2_replace(lambda q, k, v, options: 0.5 * q, "output", 1)
    found, expected = small.sample(traced(patched)), small.sample(patched)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.nightly
@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="inductor compiles with g++ and Python's headers",
)
@pytest.mark.usefixtures("traced")
def test_the_node_itself(small):
    """With inductor, on a UNet of two layers: it compiles a minute for every ten."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = small.model("two layers")
    patched = small.apply(model, small.adapter("two layers"), small.images(), mask=MASK)
    compiled = TorchCompileModel.execute(patched, "inductor").args[0]
    found, expected, bare = (small.sample(m) for m in (compiled, patched, model))
    effect = float((expected - bare).abs().max())
    assert float((found - expected).abs().max()) <= 1e-4 * effect
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
