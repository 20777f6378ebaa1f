"""λ, layer weights, images, masks, windows and precision, against the explicit truth."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly

AT = (0.2, 0.4, 0.6, 0.8)  # where the steps lie
WINDOWS = [*((0.4, 0.6), (0.4, 0.4)), *nightly(((0.0, 0.2),), ((0.8, 1.0),), ((0.41, 0.79),))]
SAMPLERS = ["euler", "heun", "uni_pc", *nightly("ddim", "dpmpp_2m")]


def mask(*shape: int) -> torch.Tensor:
    return 0.2 + 0.8 * torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("weight", [0.3, -1.0, 2.5])
def test_weight(comparison, weight):
    comparison().on_model(weight=weight).check()


@pytest.mark.parametrize("combine", ["concat", "average"])
def test_several_images(comparison, small, combine):
    comparison().on_model(image_prompt=small.images(3), combine=combine, weight=0.8).check()


@pytest.mark.parametrize("family", ["sd15", "sdxl", *nightly("sdxl70")])
def test_layer_weights_are_in_checkpoint_order(comparison, small, family):
    weights = [0.2 * i - 1.1 for i in range(len(small.LAYERS[family]))]
    comparison(family=family).on_model(layer_weights=weights).check()


@pytest.mark.parametrize(
    "shape, size",
    [
        ((1, 1, 1), 8),
        ((1, 3, 200), (12, 20)),
        ((16, 16), (9, 15)),
        ((1, 512, 384), (9, 15)),
        ((2, 9, 9), (20, 12)),
        ((1, 64, 64), 8),
    ],
    ids=str,
)
def test_masks_of_any_size_on_latents_of_any_size(comparison, shape, size):
    comparison(family="sd15").on_model(mask=mask(*shape)).check(size=size)


def test_a_mask_is_sampled_once_for_all_steps_and_both_sides(small, monkeypatch):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import masks

    sampled, before = [], masks.mask_levels
    monkeypatch.setattr(masks, "mask_levels", lambda *a: sampled.append(a) or before(*a))
    given = small.model("tiny"), small.adapter("tiny"), small.images()
    small.sample(small.apply(*given, mask=mask(1, 64, 64)), at=AT)
    assert len(sampled) == 1


def test_several_prompts(comparison, small):
    """Different in everything that could keep texts from sharing a call; two windows meet on the
    step at 0.4, which has both prompts, as both texts."""
    early = small.text(1, start_percent=0.0, end_percent=0.4)
    late = small.text(2, start_percent=0.4, end_percent=1.0)
    compared = comparison(early + late, small.text(3))
    masks = [None, mask(1, 8, 8), mask(1, 3, 3), None]
    windows = [(0.0, 0.4), (0.4, 0.7), (0.4, 0.4), (0.6, 1.0)]
    for number, (start, end) in enumerate(windows):
        compared.on_model(
            adapter=small.adapter("tiny", seed=10 + number, tokens=3 + number % 2),
            image_prompt=small.images(1 + number, seed=number),
            mask=masks[number],
            weight=0.5 + 0.2 * number,
            start_at=start,
            end_at=end,
        )
    compared.check(at=AT)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_exactly_the_steps_in_the_window_differ(small, window, sampler):
    from comfy.patcher_extension import WrappersMP

    model, calls = small.model("tiny"), []

    def record(executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        out = executor(x, t, c_concat, c_crossattn, *args, **kwargs)
        calls.append((float(t[0]), x.clone(), c_crossattn, out.clone()))
        return out

    given = small.adapter("tiny"), small.images()
    patched = small.apply(model, *given, start_at=window[0], end_at=window[1])
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "record", record)
    small.sample(patched, at=AT, batch=1, sampler=sampler)
    assert len(calls) >= len(AT)
    start, end = map(model.model.model_sampling.percent_to_sigma, window)
    for sigma, x, text, out in calls:
        plain = model.model.apply_model(x, torch.full(x.shape[:1], sigma), c_crossattn=text)
        assert torch.equal(out, plain) != (end <= sigma <= start), sigma


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("route", ["model", "conditioning"])
def test_a_window_without_a_step_changes_no_bit(small, route, sampler):
    model, options = small.model("tiny"), {"at": (0.1, 0.7, 0.9), "sampler": sampler}
    given = small.adapter("tiny"), small.images()
    patched = small.applied(route, model, *given, start_at=0.25, end_at=0.4)
    assert torch.equal(small.sample(*patched, **options), small.sample(model, **options))


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"layer_weights": [0.0] * 16}], ids=str)
def test_lambda_0_gives_the_model_back(small, settings):
    model, texts = small.model(), (small.text(1), small.text(2))
    given = small.adapter(), small.images()
    assert small.apply(model, *given, **settings) is model
    found = small.apply_conditioning(model, *texts, *given, **settings)
    assert all(a is b for a, b in zip(found, (model, *texts), strict=True))


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.4, 0.6), (0.4, 1.0), (0.5, 0.9)], ids=str)
def test_conditionings_with_ranges_of_their_own(comparison, small, window):
    """Two texts share the step at 0.4, where the host averages them; one has no image."""
    early = small.text(1, start_percent=0.0, end_percent=0.4)
    late = small.text(2, start_percent=0.4, end_percent=1.0)
    compared = comparison(early, late, small.text(3))
    compared.on_texts(positive=1, start_at=window[0], end_at=window[1]).check(at=AT)


@pytest.mark.parametrize("kind, zsnr", [("v_prediction", True), ("lcm", False)])
@pytest.mark.parametrize("order", ["images first", "images last"])
def test_fractions_are_of_the_schedule_that_is_sampled(comparison, small, order, kind, zsnr):
    """ModelSamplingDiscrete gives the model other sigmas, after Apply as well as before."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    def resampled(model):
        return ModelSamplingDiscrete().patch(model, kind, zsnr)[0]

    compared = comparison(model=resampled(small.model("tiny")))
    if order == "images last":
        compared.on_model(start_at=0.4, end_at=0.6).check(at=AT)
    else:
        compared.model = small.model("tiny")
        compared.on_model(start_at=0.4, end_at=0.6)
        compared.model = resampled(compared.model)
        compared.check(at=AT)


CHANGES = {
    "plain": {},
    "mask": {"mask": mask(1, 10, 10)},
    "curve": {"weight_curve": [[0.3, 1.0], [0.6, 0.3]]},
    "weights of latents": {"latent_weights": [1.0, -0.4]},
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float16, *nightly(torch.bfloat16)], ids=str)
def test_half_precision_weights_cast_as_the_host_does_on_a_cpu(comparison, small, dtype, case):
    """Exactly the float32 result of the same rounded weights."""
    model = small.model("tiny", dtype=dtype, cast=torch.float32)
    reference = small.model("tiny", seed=99)  # its own, since its weights are replaced
    weights = model.model.diffusion_model.state_dict()
    reference.model.diffusion_model.load_state_dict({k: v.float() for k, v in weights.items()})
    compared = comparison(model=reference)
    compared.model = model
    compared.on_model(weight=0.8, **CHANGES[case]).check()


def test_float64(comparison, small):
    model = small.model("tiny", dtype=torch.float64)
    comparison(model=model).on_model().check(tolerance=1e-5)


@pytest.mark.parametrize("case", CHANGES)
def test_bfloat16_computation(small, case):
    """Everything in bfloat16: near float32, and the pack adds tensors of no other dtype."""
    half, full = small.model("tiny", dtype=torch.bfloat16), small.model("tiny")
    given = small.adapter("tiny"), small.images()
    found, expected = (
        small.sample(small.apply(m, *given, weight=2.0, **CHANGES[case])) for m in (half, full)
    )
    change = float((expected - small.sample(full)).abs().max())
    assert float((found - expected).abs().max()) < 0.2 * change


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_adapters(small, dtype):
    """As published files are stored: computed in float32 from the rounded weights."""
    stored, rounded = small.adapter("tiny"), small.adapter("tiny")
    stored.module.to(dtype)
    for weight in rounded.module.parameters():
        weight.data = weight.data.to(dtype).float()
    found, expected = (
        small.sample(small.apply(small.model("tiny"), adapter, small.images()))
        for adapter in (stored, rounded)
    )
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
