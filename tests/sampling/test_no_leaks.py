"""A branch of the graph never feels what another one does, nor a run what came before it.

The adapter is on the device while K' and V' are computed, and nowhere afterwards.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from benchmarks.budget import reachable


@pytest.fixture(params=["model", "conditioning"])
def applied(request, small):
    """Apply by either route to a model, an adapter and images: a model and two conditionings."""

    def applied(*given, **settings):
        return small.applied(request.param, *given, **settings)

    return applied


def state(model):
    """All that Apply or a run could change, in a form that later changes do not reach."""

    def frozen(value):
        if isinstance(value, dict):
            return {key: frozen(v) for key, v in value.items()}
        return [frozen(v) for v in value] if isinstance(value, list) else id(value)

    parts = "model_options", "attachments", "wrappers", "callbacks", "additional_models"
    parts += "object_patches", "patches", "injections", "hook_patches"
    return {part: frozen(getattr(model, part)) for part in parts}


def loaded():
    import comfy.model_management as memory

    return [entry.model.model for entry in memory.current_loaded_models if entry.model]


def test_two_nodes_in_a_chain_the_second_edited(small):
    model, adapter, other = (
        small.model("tiny"),
        small.adapter("tiny"),
        small.adapter("tiny", seed=11),
    )
    bare = small.sample(model)
    first = small.apply(model, adapter, small.images(seed=1))
    alone = small.sample(first)
    for weight in (0.9, -0.4, 0.2):
        found = small.sample(small.apply(first, other, small.images(seed=2), weight=weight))
        fresh = small.apply(small.model("tiny"), adapter, small.images(seed=1))
        fresh = small.apply(fresh, other, small.images(seed=2), weight=weight)
        assert torch.equal(found, small.sample(fresh)) and not torch.equal(found, alone)
        assert torch.equal(small.sample(first), alone) and torch.equal(small.sample(model), bare)


def test_models_are_as_they_were(small):
    given, model = (small.adapter("tiny"), small.images()), small.model("tiny")
    before = state(model)
    patched = small.apply(model, *given, end_at=0.5)
    patched_before = state(patched)
    again = small.apply(patched, *given)
    assert state(patched) == patched_before
    small.sample(again)
    small.sample(patched)
    assert state(patched) == patched_before and state(model) == before


def test_conditionings_are_as_they_were(small):
    given = small.adapter("tiny"), small.images()
    texts = small.text(1, start_percent=0.1), small.text(2)

    def copy(conditionings):
        return [[id(states), dict(options)] for c in conditionings for states, options in c]

    patched, *attached = small.apply_conditioning(small.model("tiny"), *texts, *given)
    once = copy((*texts, *attached))
    inner = [dict(c[0][1]["model_conds"]) for c in attached]
    again, *twice = small.apply_conditioning(patched, *attached, *given, weight=0.5)
    small.sample(again, *twice)
    first = small.sample(patched, *attached)
    assert copy((*texts, *attached)) == once
    assert [dict(c[0][1]["model_conds"]) for c in attached] == inner
    assert "model_conds" not in texts[0][0][1]
    assert torch.equal(small.sample(patched, *attached), first)


def test_interrupted_in_the_middle(small, applied):
    from comfy.model_management import InterruptProcessingException

    model, given = small.model("tiny"), (small.adapter("tiny"), small.images())
    bare = small.sample(model)
    settings = {"mask": torch.rand(1, 9, 9), "start_at": 0.2, "end_at": 0.5}
    patched, *texts = applied(model, *given, **settings)
    guider = small.guider(patched, *texts)
    expected, before = small.run(guider), state(patched)

    def interrupt(step, *_):
        raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        small.run(guider, callback=interrupt)
    assert state(patched) == before
    assert torch.equal(small.run(guider), expected)
    assert torch.equal(small.sample(patched, *texts), expected)
    assert torch.equal(small.sample(model), bare)


def test_one_guider_many_sizes(small):
    """What is prepared for a run belongs to that run."""
    given = small.model("tiny"), small.adapter("tiny"), small.images(2)
    patched = small.apply(*given, mask=torch.rand(2, 9, 9), combine="per_latent")
    guider = small.guider(patched, small.text(1), small.text(2))
    shapes = [{"size": 8}, {"size": (8, 16)}, {"size": 8, "batch": 4}]
    first = [small.run(guider, **shape) for shape in shapes]
    again = [small.run(guider, **shape) for shape in reversed(shapes)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


def test_no_adapter_parameter_is_resident(small, applied, monkeypatch):
    adapter, seen = small.adapter("tiny"), []
    tokens = type(adapter.module).tokens

    def watched(module, features):
        seen.append(adapter.module in loaded())
        return tokens(module, features)

    monkeypatch.setattr(type(adapter.module), "tokens", watched)
    made = applied(small.model("tiny"), adapter, small.images())
    assert seen and all(seen), "the host does not know of the adapter while it computes"
    assert adapter.module not in loaded()
    small.sample(*made, at=(0.5,))
    assert adapter.module not in loaded()
    mine = {id(p) for p in adapter.module.parameters()}
    held = [thing for thing in reachable(*made) if id(thing) in mine or thing is adapter.module]
    assert not held
    assert any(id(thing) in mine for thing in reachable(lambda: adapter)), "nothing is found"


def test_the_adapter_is_freed_while_the_patched_model_lives(small, applied):
    adapter = small.adapter("tiny")
    made = applied(small.model("tiny"), adapter, small.images())
    before = small.sample(*made)
    dead = [weakref.ref(adapter), weakref.ref(adapter.module)]
    dead += [weakref.ref(parameter) for parameter in adapter.module.parameters()]
    del adapter
    gc.collect()
    assert not any(reference() is not None for reference in dead)
    assert torch.equal(small.sample(*made), before)


def test_thirty_runs_leave_nothing(small, applied):
    given = small.model("tiny"), small.adapter("tiny"), small.images()
    mask = torch.rand(1, 9, 9)

    def sample(times):
        for number in range(times):
            made = applied(*given, weight=0.1 * number + 0.1, mask=mask)
            small.sample(*made, at=(0.5,))

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    sample(3)  # what is cached for good is cached now
    before, models = tensors(), len(loaded())
    sample(30)
    assert tensors() <= before and len(loaded()) == models


def test_a_failed_compilation_unloads_the_adapter_too(small, monkeypatch):
    adapter = small.adapter("tiny")
    monkeypatch.setattr(type(adapter.module), "tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small.apply(small.model("tiny"), adapter, small.images())
    assert adapter.module not in loaded()
