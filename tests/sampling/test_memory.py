"""The adapter is on the device while K' and V' are computed, and nowhere afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from benchmarks.budget import reachable


@pytest.fixture(params=["model", "conditioning"])
def apply(request, small):
    """Apply by either route, and a function that samples the result."""

    def apply(model, adapter, images, **settings):
        texts = small.text(1), small.text(2)
        if request.param == "model":
            made = small.apply(model, adapter, images, **settings), *texts
        else:
            made = small.apply_conditioning(model, *texts, adapter, images, **settings)
        return made, lambda: small.run(small.guider(*made), at=(0.5,))

    return apply


def loaded():
    import comfy.model_management as memory

    return [entry.model.model for entry in memory.current_loaded_models if entry.model]


def test_no_adapter_parameter_is_resident(small, apply, monkeypatch):
    adapter = small.adapter("tiny")
    seen = []
    tokens = type(adapter.module).tokens

    def watched(module, features):
        seen.append(adapter.module in loaded())
        return tokens(module, features)

    monkeypatch.setattr(type(adapter.module), "tokens", watched)
    made, sample = apply(small.model("tiny"), adapter, small.images())
    assert seen and all(seen), "the host does not know of the adapter while it computes"
    assert adapter.module not in loaded()
    sample()
    assert adapter.module not in loaded()
    mine = {id(p) for p in adapter.module.parameters()}
    held = [thing for thing in reachable(*made) if id(thing) in mine or thing is adapter.module]
    assert not held
    assert any(id(thing) in mine for thing in reachable(lambda: adapter)), "nothing is found"


def test_the_adapter_is_freed_while_the_patched_model_lives(small, apply):
    adapter = small.adapter("tiny")
    made, sample = apply(small.model("tiny"), adapter, small.images())
    before = sample()
    dead = [weakref.ref(adapter), weakref.ref(adapter.module)]
    dead += [weakref.ref(parameter) for parameter in adapter.module.parameters()]
    del adapter
    gc.collect()
    assert not any(reference() is not None for reference in dead)
    assert torch.equal(sample(), before)
    assert made


def test_thirty_runs_leave_nothing(small, apply):
    model, adapter, images = small.model("tiny"), small.adapter("tiny"), small.images()
    mask = torch.rand(1, 9, 9)

    def once(number):
        _, sample = apply(model, adapter, images, weight=0.1 * number + 0.1, mask=mask)
        return sample()

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    for number in range(3):  # what is cached for good is cached now
        once(number)
    before, models = tensors(), len(loaded())
    for number in range(30):
        once(number)
    assert tensors() <= before
    assert len(loaded()) == models


def test_a_failed_compilation_unloads_the_adapter_too(small, monkeypatch):
    adapter = small.adapter("tiny")
    monkeypatch.setattr(type(adapter.module), "tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small.apply(small.model("tiny"), adapter, small.images())
    assert adapter.module not in loaded()
