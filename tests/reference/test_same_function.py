"""One UNet and one checkpoint predict the same noise in ComfyUI with this pack and in diffusers."""

from __future__ import annotations

import gc
import os
from itertools import product

import pytest
import torch
from torch.nn.functional import interpolate

from tests.support.checkpoint_layouts import ip_adapter, resampler
from tests.support.random_models import weights
from tests.support.sets import nightly

TOLERANCE = 1e-4
SIZE = (16, 24)  # of the latent; the deepest level of SD1.5 is 2 × 3
FAMILIES = ["sd15", "sdxl"]
ROUTES = [(0.3, "model"), (1.0, "conditioning")]
ADAPTERS = [("base",), ("plus",), ("full",), ("base", "plus"), ("full", "base")]
# Images, and the mask's size: none, the picture's, and one that is no multiple of the latent's.
IMAGES_AND_MASKS = [(1, None), (3, None), (1, (101, 150)), (3, (128, 192))]


def smooth_mask(size, seed):
    """Soft random patches in 0 … 1."""
    if size is None:
        return None
    coarse = torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, size, mode="bilinear")[0]


@pytest.fixture(params=FAMILIES)
def pair(request, pairs):
    return pairs[request.param]


@pytest.fixture
def compare(both, pair):
    def run(settings, route="model", size=SIZE):
        """Asserts that ComfyUI with `settings` predicts what diffusers does; returns how much
        the image prompts change the prediction."""
        every = [1.0] * len(pair.family.widths)
        given = {
            "kinds": [s.kind for s in settings],
            "prompts": [s.prompt for s in settings],
            "scales": [[s.weight * factor for factor in s.layers or every] for s in settings],
            "masks": None if settings[0].mask is None else [s.mask[None] for s in settings],
            "one_sequence": settings[0].mask is not None,
        }
        calls, effects = pair.comfy(settings, route, size), []
        assert sum(len(call.rows) for call in calls) == 4
        for call, plain in zip(calls, pair.plain(size), strict=True):
            expected = pair.diffusers(call, **given)
            assert both.error(call.out, expected) < TOLERANCE
            effects.append(both.error(plain.out, expected))
        return min(effects)

    return run


def test_without_an_image_prompt(both, pair):
    for call in pair.plain(SIZE):
        assert both.error(call.out, pair.diffusers(call)) < TOLERANCE


def noise_cases():
    """All; by day as many as hold every pair of two inputs' values."""
    for case in product(*map(enumerate, (FAMILIES, ADAPTERS, ROUTES, IMAGES_AND_MASKS))):
        (f, family), (k, kinds), (r, route), (i, images) = case
        by_day = r == (k + i) % 2 and f == (k + i // 2) % 2
        marks = () if by_day else pytest.mark.nightly
        yield pytest.param(family, kinds, *route, *images, marks=marks)


@pytest.mark.parametrize(
    "pair, kinds, weight, route, images, mask", noise_cases(), indirect=["pair"]
)
def test_noise_agrees(both, pair, compare, kinds, weight, route, images, mask):
    settings = []
    for n, kind in enumerate(kinds):
        prompt = pair.encoder.prompt(images, seed=n)
        settings += [both.Setting(kind, prompt, weight * (1 + n), smooth_mask(mask, seed=n))]
    assert compare(settings, route) > 100 * TOLERANCE, "no effect, so this shows nothing"


# With masks only such as diffusers finds the levels' shapes of: it guesses them from their area.
@pytest.mark.parametrize(
    "size, masked",
    [
        *(((33, 5), False), ((7, 9), True)),
        *nightly(((10, 26), False), ((8, 8), True), ((24, 16), True)),
    ],
)
def test_latents_of_other_sizes(both, pair, compare, size, masked):
    mask = smooth_mask((8 * size[0], 8 * size[1]), seed=5) if masked else None
    settings = [both.Setting("base", pair.encoder.prompt(1, seed=0), mask=mask)]
    assert compare(settings, size=size) > 100 * TOLERANCE


@pytest.fixture
def kolors_plus(pairs):
    """An adapter whose resampler is as wide as the published one, at few layers' width."""
    pair = pairs["kolors"]
    projection = resampler(pair.encoder.hidden, pair.family.context, 2048, heads=12)
    layout = ip_adapter(projection, pair.family.widths, pair.family.context)
    pair._weights["plus"] = weights(layout, gains={"_ip.weight": 2.0})


@pytest.mark.parametrize("pair", ["kolors"], indirect=True)
@pytest.mark.parametrize(
    "weight, route, images, mask",
    [(0.7, "model", 3, (101, 150)), *nightly((1.0, "conditioning", 1, None))],
)
@pytest.mark.usefixtures("kolors_plus")
def test_kolors(both, pair, compare, weight, route, images, mask):
    given = pair.encoder.prompt(images, seed=0), weight, smooth_mask(mask, seed=0)
    assert compare([both.Setting("plus", *given)], route) > 100 * TOLERANCE
    for call in pair.plain(SIZE):
        assert both.error(call.out, pair.diffusers(call)) < TOLERANCE


@pytest.mark.parametrize("made_for, other", [("sdxl", "kolors"), ("kolors", "sdxl")])
@pytest.mark.usefixtures("kolors_plus")
def test_kolors_and_sdxl_refuse_each_others(both, pairs, made_for, other):
    pair, model = pairs[made_for], both.comfy_model(pairs[other].family)
    named = {"kolors": r"Kolors \(", "sdxl": "a model of "}
    said = rf"made for {named[made_for]}70 .* is {named[other]}70 .*Connect a model"
    with pytest.raises(ValueError, match=said):
        both.small.apply(model, pair.adapter("plus"), pair.encoder.prompt(1, seed=0))


def test_a_mask_coarser_than_the_latent(both, pair, compare):
    mask = smooth_mask((5, 7), seed=6)
    settings = [both.Setting("base", pair.encoder.prompt(1, seed=0), mask=mask)]
    assert compare(settings) > 100 * TOLERANCE


def test_a_weight_for_each_layer(both, pair, compare):
    generator = torch.Generator().manual_seed(4)
    layers = tuple(torch.randn(len(pair.family.widths), generator=generator).tolist())
    settings = [both.Setting("base", pair.encoder.prompt(1, seed=0), layers=layers)]
    assert compare(settings) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["base", *nightly("plus")])
def test_a_mask_for_each_image(both, pair, kind):
    """As diffusers means it, the images attend apart, each within its mask; here: three nodes."""
    prompt = pair.encoder.prompt(3, seed=0)
    masks = [smooth_mask((128, 192), seed) for seed in range(3)]
    settings = [both.Setting(kind, both.only(prompt, n), 0.8, masks[n]) for n in range(3)]
    scales = [[0.8] * len(pair.family.widths)]
    for call in pair.comfy(settings, "model", SIZE):
        expected = pair.diffusers(call, [kind], [prompt], scales, [torch.stack(masks, dim=1)])
        assert both.error(call.out, expected) < TOLERANCE


@pytest.fixture
def real(request, both):
    """The published sizes, once, and nothing kept: each is gigabytes."""
    both.comfy_model.cache_clear()
    torch.set_num_threads(os.cpu_count() or 1)
    pair = both.Pair(getattr(both, request.param), both.VIT_H)
    yield pair
    vars(pair).clear()
    both.comfy_model.cache_clear()
    gc.collect()


SLOW = pytest.mark.skipif(
    "IP_ADAPTER_SLOW" not in os.environ, reason="14 GB: set IP_ADAPTER_SLOW to run it"
)


@pytest.mark.parametrize(
    "real, parameters, size, masked",
    [
        pytest.param("SD15", 859_520_964, (16, 16), False, marks=pytest.mark.nightly),
        pytest.param("SDXL", 2_567_463_684, (32, 32), True, marks=[pytest.mark.slow, SLOW]),
    ],
    indirect=["real"],
)
def test_noise_agrees_at_the_real_size(both, real, parameters, size, masked):
    unet = both.comfy_model(real.family).model.diffusion_model
    assert sum(p.numel() for p in unet.parameters()) == parameters
    mask = torch.rand(1, 256, 256) if masked else None
    settings = [both.Setting("base", real.encoder.prompt(1, seed=0), 0.8, mask)]
    scales = [[0.8] * len(real.family.widths)]
    masks = [mask[None]] if masked else None
    for call in real.comfy(settings, "model", size):
        expected = real.diffusers(call, ["base"], [settings[0].prompt], scales, masks)
        assert both.error(call.out, expected) < TOLERANCE
