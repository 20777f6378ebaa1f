"""A branch of the graph never feels what another one does, nor a run what came before it."""

from __future__ import annotations

import pytest
import torch


def run(small, model, **options):
    return small.run(small.guider(model, small.text(1), small.text(2)), **options)


def state(model):
    """All that Apply or a run could change, in a form that later changes do not reach."""

    def frozen(value):
        if isinstance(value, dict):
            return {key: frozen(v) for key, v in value.items()}
        return [frozen(v) for v in value] if isinstance(value, list) else id(value)

    parts = "model_options", "attachments", "wrappers", "callbacks", "additional_models"
    parts += "object_patches", "patches", "injections", "hook_patches"
    return {part: frozen(getattr(model, part)) for part in parts}


def test_two_nodes_in_a_chain_the_second_edited(small):
    model, adapter, others = small.model(), small.adapter(), small.adapter(seed=11)
    bare = run(small, model)
    first = small.apply(model, adapter, small.images(seed=1))
    alone = run(small, first)
    for weight in (0.9, -0.4, 0.2):
        second = small.apply(first, others, small.images(seed=2), weight=weight)
        found = run(small, second)
        fresh = small.apply(
            small.apply(small.model(), adapter, small.images(seed=1)),
            small.adapter(seed=11),
            small.images(seed=2),
            weight=weight,
        )
        assert torch.equal(found, run(small, fresh))
        assert not torch.equal(found, alone)
        assert torch.equal(run(small, first), alone)
        assert torch.equal(run(small, model), bare)


def test_models_are_as_they_were(small):
    model = small.model()
    before = state(model)
    patched = small.apply(model, small.adapter(), small.images(), end_at=0.5)
    assert state(model) == before
    patched_before = state(patched)
    again = small.apply(patched, small.adapter(), small.images())
    assert state(patched) == patched_before
    run(small, again)
    run(small, patched)
    assert state(patched) == patched_before
    assert state(model) == before


def test_conditionings_are_as_they_were(small):
    model, adapter, images = small.model(), small.adapter(), small.images()
    positive, negative = small.text(1, start_percent=0.1), small.text(2)

    def copy(conditioning):
        return [[id(states), dict(options)] for states, options in conditioning]

    patched, *attached = small.apply_conditioning(model, positive, negative, adapter, images)
    once = [copy(c) for c in (positive, negative, *attached)]
    inner = [dict(c[0][1]["model_conds"]) for c in attached]
    again, *twice = small.apply_conditioning(patched, *attached, adapter, images, weight=0.5)
    small.run(small.guider(again, *twice))
    first = small.run(small.guider(patched, *attached))
    assert [copy(c) for c in (positive, negative, *attached)] == once
    assert [dict(c[0][1]["model_conds"]) for c in attached] == inner
    assert "model_conds" not in positive[0][1]
    assert torch.equal(small.run(small.guider(patched, *attached)), first)


@pytest.mark.parametrize("route", ["model", "conditioning"])
def test_interrupted_in_the_middle(small, route):
    from comfy.model_management import InterruptProcessingException

    texts, given = (small.text(1), small.text(2)), (small.adapter(), small.images())
    bare = run(small, small.model())
    settings = {"mask": torch.rand(1, 9, 9), "start_at": 0.2, "end_at": 0.5}
    if route == "model":
        patched, *conds = small.apply(small.model(), *given, **settings), *texts
    else:
        patched, *conds = small.apply_conditioning(small.model(), *texts, *given, **settings)
    guider = small.guider(patched, *conds)
    expected, before = small.run(guider), state(patched)

    def interrupt(step, *_):
        raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        small.run(guider, callback=interrupt)
    assert state(patched) == before
    assert torch.equal(small.run(guider), expected)
    assert torch.equal(small.run(small.guider(patched, *conds)), expected)
    assert torch.equal(run(small, small.model()), bare)


def test_one_guider_many_sizes(small):
    """What is prepared for a run belongs to that run."""
    settings = {"mask": torch.rand(2, 9, 9), "combine": "per_latent"}
    patched = small.apply(small.model(), small.adapter(), small.images(2), **settings)
    guider = small.guider(patched, small.text(1), small.text(2))
    shapes = [{"size": 8}, {"size": (8, 16)}, {"size": 8, "batch": 4}]
    first = [small.run(guider, **shape) for shape in shapes]
    again = [small.run(guider, **shape) for shape in reversed(shapes)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
