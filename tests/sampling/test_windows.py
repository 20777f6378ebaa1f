"""start_at and end_at: in force at both ends, and bit for bit the bare model outside."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly

AT = (0.2, 0.4, 0.6, 0.8)  # where the steps lie
WINDOWS = [
    *((0.4, 0.6), (0.4, 0.4)),
    *nightly(((0.0, 0.2),), ((0.8, 1.0),), ((0.41, 0.79),)),
]
SAMPLERS = ["euler", "heun", "uni_pc", *nightly("ddim", "dpmpp_2m")]


def recorded(model):
    """A clone, and a list of (sigma, input, text, output) of its UNet calls."""
    from comfy.patcher_extension import WrappersMP

    calls = []

    def record(executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        out = executor(x, t, c_concat, c_crossattn, *args, **kwargs)
        calls.append((float(t[0]), x.clone(), c_crossattn, out.clone()))
        return out

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "record", record)
    return clone, calls


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_exactly_the_steps_in_the_window_differ(small, window, sampler):
    model = small.model()
    start, end = map(model.model.model_sampling.percent_to_sigma, window)
    patched = small.apply(
        model, small.adapter(), small.images(), start_at=window[0], end_at=window[1]
    )
    watched, calls = recorded(patched)
    guider = small.guider(watched, small.text(1), small.text(2))
    small.run(guider, at=AT, batch=1, sampler=sampler)
    assert len(calls) >= len(AT)
    for sigma, x, text, out in calls:
        plain = model.model.apply_model(x, torch.full(x.shape[:1], sigma), c_crossattn=text)
        assert torch.equal(out, plain) != (end <= sigma <= start), sigma


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("route", ["model", "conditioning"])
def test_a_window_without_a_step_changes_no_bit(small, route, sampler):
    model, texts = small.model(), (small.text(1), small.text(2))
    at = (0.1, 0.7, 0.9)
    given = small.adapter(), small.images()
    window = {"start_at": 0.25, "end_at": 0.4}
    if route == "model":
        patched = small.apply(model, *given, **window), *texts
    else:
        patched = small.apply_conditioning(model, *texts, *given, **window)
    found, plain = (
        small.run(small.guider(*g), at=at, sampler=sampler) for g in (patched, (model, *texts))
    )
    assert torch.equal(found, plain)


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"layer_weights": [0.0] * 16}], ids=str)
def test_lambda_0_gives_the_model_back(small, settings):
    model, texts = small.model(), (small.text(1), small.text(2))
    given = small.adapter(), small.images()
    assert small.apply(model, *given, **settings) is model
    found = small.apply_conditioning(model, *texts, *given, **settings)
    assert all(a is b for a, b in zip(found, (model, *texts), strict=True))


def test_several_prompts_each_with_its_window(small, truth):
    """They meet on the step at 0.4, which has both, as the host's own ranges would."""
    model, adapter, texts = small.model(), small.adapter(), (small.text(1), small.text(2))
    windows = [(0.0, 0.4), (0.4, 0.7), (0.6, 1.0)]
    patched, sides = model, ([], [])
    for seed, (start, end) in enumerate(windows):
        settings = {"start_at": start, "end_at": end, "weight": 0.5 + 0.2 * seed}
        images = small.images(seed=seed)
        patched = small.apply(patched, adapter, images, **settings)
        for images_of, side in zip(sides, truth.sides(adapter, images, **settings), strict=True):
            images_of += side
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    truth.check(*(small.run(small.guider(m, *texts), at=AT) for m in (patched, expected, model)))


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.4, 0.6), (0.4, 1.0), (0.5, 0.9)], ids=str)
def test_conditionings_with_ranges_of_their_own(small, truth, window):
    """Two texts share the step at 0.4, where the host averages them; one has no image."""
    model, adapter, images = small.model(), small.adapter(), small.images()
    early = small.text(1, start_percent=0.0, end_percent=0.4)
    late = small.text(2, start_percent=0.4, end_percent=1.0)
    negative = small.text(3)
    settings = {"start_at": window[0], "end_at": window[1]}
    sides = truth.sides(adapter, images, **settings)
    expected = truth.apply(
        model, small.SD15_LAYERS, (early, []), (late, sides[0]), (negative, sides[1])
    )
    patched, with_images, uncond = small.apply_conditioning(
        model, late, negative, adapter, images, **settings
    )
    truth.check(
        small.run(small.guider(patched, early + with_images, uncond), at=AT),
        *(small.run(small.guider(m, early + late, negative), at=AT) for m in (expected, model)),
    )


@pytest.mark.parametrize("kind, zsnr", [("v_prediction", True), ("lcm", False)])
@pytest.mark.parametrize("order", ["images first", "images last"])
def test_fractions_are_of_the_schedule_that_is_sampled(small, truth, order, kind, zsnr):
    """ModelSamplingDiscrete gives the model other sigmas, after Apply as well as before."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    def resampled(model):
        return ModelSamplingDiscrete().patch(model, kind, zsnr)[0]

    given, texts = (small.adapter(), small.images()), (small.text(1), small.text(2))
    settings = {"start_at": 0.4, "end_at": 0.6}
    plain = resampled(small.model())
    expected = truth.apply(
        plain, small.SD15_LAYERS, *zip(texts, truth.sides(*given, **settings), strict=True)
    )
    if order == "images last":
        patched = small.apply(plain, *given, **settings)
    else:
        patched = resampled(small.apply(small.model(), *given, **settings))
    truth.check(*(small.run(small.guider(m, *texts), at=AT) for m in (patched, expected, plain)))
