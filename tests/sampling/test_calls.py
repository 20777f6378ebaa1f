"""The pack never makes the host call the UNet more often, or with more rows, than without it.

It would where conditionings came to differ in what they carry: the host runs those separately.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly

AT = (0.2, 0.4, 0.6)
WINDOWS = [(0.4, 0.6), *nightly(((0.0, 1.0),), ((0.45, 0.55),))]
SAMPLERS = ["euler", "heun", "uni_pc", *nightly("ddim", "dpmpp_2m")]


def knobs(window):
    return {"start_at": window[0], "end_at": window[1]}


@pytest.fixture
def same_calls(small):
    """Compare two guiders, each given as a function of a model, on two models."""

    def same_calls(made, patched, plain, model, **options):
        counts = []
        for make, m in ((made, patched), (plain, model)):
            watched, calls = small.counted(m)
            small.run(make(watched), at=AT, batch=1, **options)
            counts.append(calls)
        assert counts[0] == counts[1]
        assert len(counts[0]) >= len(AT)

    return same_calls


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_guidances(small, guidance, same_calls, window):
    texts = [small.text(i) for i in range(3)]
    patched = small.apply(small.model(), small.adapter(), small.images(), **knobs(window))

    def make(model):
        return guidance(model, *texts)

    size = 16 if guidance.__name__ == "self_attention" else 8
    same_calls(make, patched, make, small.model(), size=size)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_samplers(small, same_calls, sampler, window):
    patched = small.apply(small.model(), small.adapter(), small.images(), **knobs(window))

    def make(model):
        return small.guider(model, small.text(1), small.text(2))

    same_calls(make, patched, make, small.model(), sampler=sampler)


def test_regions_on_the_model(small, regions, same_calls, regional):
    settings = {"mask": regions.image_mask(), **knobs((0.4, 0.5))}
    patched = small.apply(small.model(), small.adapter(), small.images(), **settings)

    def make(model):
        return small.guider(model, *regional)

    same_calls(make, patched, make, small.model(), size=regions.SIZE)


def test_regions_of_which_one_has_images(small, regions, same_calls, regional):
    positive, negative = regional
    settings = {"mask": regions.image_mask(), **knobs((0.4, 0.5))}
    patched, last, uncond = small.apply_conditioning(
        small.model(), positive[1:], negative, small.adapter(), small.images(), **settings
    )
    same_calls(
        lambda model: small.guider(model, positive[:1] + last, uncond),
        patched,
        lambda model: small.guider(model, positive, negative),
        small.model(),
        size=regions.SIZE,
    )


@pytest.mark.parametrize("memory", ["enough", "short"])
@pytest.mark.parametrize("side", ["positive", "negative", "one of two positives"])
def test_only_some_conditionings_have_images(request, small, same_calls, side, memory):
    if memory == "short":
        request.getfixturevalue("split_for_memory")
    first, second, negative = (small.text(i) for i in range(3))
    patched, with_images, uncond = small.apply_conditioning(
        small.model(), first, negative, small.adapter(), small.images(), end_at=0.4
    )
    made = {
        "positive": (with_images, negative),
        "negative": (first, uncond),
        "one of two positives": (with_images + second, uncond),
    }[side]
    plain = (first + second if side == "one of two positives" else first), negative
    same_calls(
        lambda model: small.guider(model, *made),
        patched,
        lambda model: small.guider(model, *plain),
        small.model(),
    )


def test_several_prompts_with_different_windows(small, same_calls):
    """Different in everything that could keep them from sharing a call."""
    masks = [None, torch.ones(1, 3, 3), torch.ones(1, 8, 8)]
    patched = small.model()
    for number, window in enumerate([(0.0, 0.4), (0.4, 0.4), (0.3, 1.0)]):
        adapter, images = small.adapter(tokens=3 + number % 2), small.images(1 + number)
        patched = small.apply(patched, adapter, images, mask=masks[number], **knobs(window))
    early = small.text(1, start_percent=0.0, end_percent=0.4)
    late = small.text(2, start_percent=0.4, end_percent=1.0)

    def make(model):
        return small.guider(model, early + late, small.text(3))

    same_calls(make, patched, make, small.model())


@pytest.mark.parametrize("lengths", [(77, 154), (77, 385)], ids=str)
def test_prompts_of_unequal_length(small, same_calls, lengths):
    texts = [small.text(i, length) for i, length in enumerate(lengths)]
    patched = small.apply(small.model(), small.adapter(), small.images(3), **knobs((0.0, 0.4)))

    def make(model):
        return small.guider(model, *texts)

    same_calls(make, patched, make, small.model())
