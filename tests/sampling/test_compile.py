"""TorchCompileModel: the same picture, traced in one piece, compiled once for many steps."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.sets import nightly


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, backend):
    from comfy_extras import nodes_torch_compile as node

    if backend == "inductor":
        return node.TorchCompileModel.execute(model, backend).args[0]
    # The node offers no other backend; these are its steps, with one that traces only.
    clone = model.clone()
    options = {"guard_filter_fn": node.skip_torch_compile_dict}
    node.set_torch_compile_wrapper(model=clone, backend=backend, options=options)
    return clone


SETTINGS = {
    "plain": {},
    "mask": {"mask": torch.rand(1, 20, 20)},
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
def test_traced_in_one_piece(small, route, setting):
    model, given = small.model("tiny"), (small.adapter("tiny"), small.images(2))
    texts, settings = (small.text(1), small.text(2)), SETTINGS[setting]
    if route == "model":
        patched, *conds = small.apply(model, *given, **settings), *texts
    else:
        patched, *conds = small.apply_conditioning(model, *texts, *given, **settings)

    def run(model, at=(0.3, 0.4, 0.6)):
        return small.run(small.guider(model, *conds), at=at)

    traced = compiled(patched, "eager")
    found, expected = run(traced), run(patched)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # With a window: one graph outside it, one inside. Neither is made twice.
    graphs = 2 if setting == "window" else 1
    assert counters["stats"]["unique_graphs"] == graphs
    run(traced)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    if setting == "window":
        bare = small.run(small.guider(model, *texts), at=(0.6,))
        assert torch.equal(run(traced, at=(0.6,)), bare)


def test_a_patch_of_another_pack_is_traced_too(small):
    patched = small.apply(small.model("tiny"), small.adapter("tiny"), small.images())
    patched.set_model_attn2_replace(lambda q, k, v, options: 0.5 * q, "output", 1)

    def run(model):
        return small.run(small.guider(model, small.text(1), small.text(2)))

    found, expected = run(compiled(patched, "eager")), run(patched)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


PYTHON_H = Path(sysconfig.get_path("include"), "Python.h")


@pytest.mark.nightly
@pytest.mark.skipif(
    shutil.which("g++") is None or not PYTHON_H.exists(),
    reason="inductor compiles with g++ and Python's headers",
)
def test_the_node_itself(small):
    """With inductor, on a UNet of two layers: it compiles a minute for every ten."""
    given = small.adapter("tiny"), small.images()
    patched = small.apply(small.model("tiny"), *given, mask=torch.rand(1, 20, 20))

    def run(model):
        return small.run(small.guider(model, small.text(1), small.text(2)))

    found, expected = run(compiled(patched, "inductor")), run(patched)
    bare = run(small.model("tiny"))
    effect = float((expected - bare).abs().max())
    assert float((found - expected).abs().max()) <= 1e-4 * effect
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
