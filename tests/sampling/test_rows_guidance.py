"""Every kind of guidance gives each conditioning its own side of the image prompt."""

from __future__ import annotations

import pytest

from tests.support.sets import nightly

WINDOWS = {"always": {}, "second step": {"start_at": 0.5, "end_at": 0.7}}
UNEQUAL = [(77, 154), (385, 77), *nightly(((154, 77),), ((77, 385),))]


@pytest.fixture(params=["one call", "split for memory"])
def memory(request):
    if request.param == "split for memory":
        request.getfixturevalue("split_for_memory")


@pytest.mark.parametrize("window", ["second step", *nightly("always")])
def test_model_route(small, truth, guidances, memory, guidance, window):
    settings = {"weight": 0.7, **WINDOWS[window]}
    model, adapter, images = small.model(), small.adapter(), small.images(2)
    texts = [small.text(i) for i in range(3)]
    positive, negative = truth.sides(adapter, images, **settings)
    # The middle conditioning of DualCFG stands for a prompt; PerpNeg's empty one for none.
    middle = negative if guidance is guidances.perp_neg else positive
    expected = truth.apply(
        model, small.SD15_LAYERS, *zip(texts, (positive, middle, negative), strict=True)
    )
    patched = small.apply(model, adapter, images, **settings)
    size = 16 if guidance is guidances.self_attention else 8  # it skips smaller latents
    truth.check(*(small.run(guidance(m, *texts), size=size) for m in (patched, expected, model)))


@pytest.mark.parametrize("name", ["cfg", "dual_cfg", "perp_neg"])
def test_conditioning_route_with_a_reference_for_each(small, truth, guidances, memory, name):
    guidance = getattr(guidances, name)
    model, adapter = small.model(), small.adapter()
    first, second = small.images(seed=1), small.images(seed=2)
    positive, middle, negative = texts = [small.text(i) for i in range(3)]
    window = WINDOWS["second step"]
    sides = *truth.sides(adapter, first), *truth.sides(adapter, second, **window)
    expected = truth.apply(
        model, small.SD15_LAYERS, (positive, sides[0]), (negative, sides[1]), (middle, sides[2])
    )
    m, positive, negative = small.apply_conditioning(model, positive, negative, adapter, first)
    m, middle, _ = small.apply_conditioning(m, middle, texts[2], adapter, second, **window)
    truth.check(
        small.run(guidance(m, positive, middle, negative)),
        *(small.run(guidance(m, *texts)) for m in (expected, model)),
    )


@pytest.mark.parametrize("lengths", UNEQUAL, ids=str)
@pytest.mark.parametrize("window", ["second step", *nightly("always")])
def test_prompts_of_unequal_length(small, truth, lengths, window):
    model, adapter, images = small.model(), small.adapter(), small.images()
    texts = [small.text(i, length) for i, length in enumerate(lengths)]
    sides = truth.sides(adapter, images, **WINDOWS[window])
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    patched = small.apply(model, adapter, images, **WINDOWS[window])
    truth.check(*(small.run(small.guider(m, *texts)) for m in (patched, expected, model)))


def test_sdxl_with_pooled_text(small, truth, guidances):
    model, adapter, images = small.model("sdxl"), small.adapter("sdxl"), small.images()
    texts = [small.text(i) for i in range(3)]
    positive, negative = truth.sides(adapter, images, weight=-0.5)
    expected = truth.apply(
        model, small.SDXL_LAYERS, *zip(texts, (positive, negative, negative), strict=True)
    )
    patched = small.apply(model, adapter, images, weight=-0.5)
    truth.check(*(small.run(guidances.perp_neg(m, *texts)) for m in (patched, expected, model)))
