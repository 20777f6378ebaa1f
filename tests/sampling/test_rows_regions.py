"""Regional prompts: each region has its text's images, and masks of images are cut with areas.

Where one side of guidance has an area and the other has none, the host adds an opposite of that
area, made of the other side's text.
"""

from __future__ import annotations

import pytest

from tests.support.sets import nightly

WINDOWS = {"always": {}, "second step": {"start_at": 0.5, "end_at": 0.7}}


@pytest.fixture
def run(small, regions):
    def run(model, positive, negative):
        return small.run(small.guider(model, positive, negative), size=regions.SIZE)

    return run


@pytest.fixture(scope="module")
def image_mask(regions):
    return regions.image_mask()


@pytest.mark.parametrize("window", ["second step", *nightly("always")])
def test_model_route_with_mask(small, truth, run, regional, image_mask, window):
    settings = {"mask": image_mask, "weight": 1.3, **WINDOWS[window]}
    model, adapter, images = small.model(), small.adapter(), small.images()
    positive, negative = regional
    sides = truth.sides(adapter, images, **settings)
    expected = truth.apply(model, small.SD15_LAYERS, (positive, sides[0]), (negative, sides[1]))
    patched = small.apply(model, adapter, images, **settings)
    truth.check(*(run(m, positive, negative) for m in (patched, expected, model)))


def test_each_region_its_own_reference(small, truth, run, regional, image_mask):
    model, adapter = small.model(), small.adapter()
    positive, negative = regional
    settings = [{"weight": 0.6, "mask": image_mask}, {"start_at": 0.5}]
    rules, attached, patched, uncond = [], [], model, negative
    for number, (entry, knobs) in enumerate(zip(positive, settings, strict=True)):
        images = small.images(seed=number)
        rules.append(truth.sides(adapter, images, **knobs))
        patched, with_images, uncond = small.apply_conditioning(
            patched, [entry], uncond, adapter, images, **knobs
        )
        attached += with_images
    expected = truth.apply(
        model,
        small.SD15_LAYERS,
        *(([entry], rule[0]) for entry, rule in zip(positive, rules, strict=True)),
        (negative, rules[0][1] + rules[1][1]),
    )
    truth.check(
        run(patched, attached, uncond),
        run(expected, positive, negative),
        run(model, positive, negative),
    )


def test_both_routes_together(small, truth, run, regions, image_mask):
    """One image for the whole picture from the model, another for one region from its text."""
    model, adapter = small.model(), small.adapter()
    positive, negative = regions.texts(small, "area over all")
    whole, regional = small.images(seed=1), small.images(2, seed=2)
    everywhere = truth.sides(adapter, whole, weight=0.5, end_at=0.4)
    somewhere = truth.sides(adapter, regional, mask=image_mask)
    expected = truth.apply(
        model,
        small.SD15_LAYERS,
        (positive[:1], everywhere[0]),
        (positive[1:], everywhere[0] + somewhere[0]),
        (negative, everywhere[1] + somewhere[1]),
    )
    patched, region, uncond = small.apply_conditioning(
        small.apply(model, adapter, whole, weight=0.5, end_at=0.4),
        positive[1:],
        negative,
        adapter,
        regional,
        mask=image_mask,
    )
    truth.check(
        run(patched, positive[:1] + region, uncond),
        run(expected, positive, negative),
        run(model, positive, negative),
    )
