"""λ that changes over the steps, and from latent to latent, against the explicit truth."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly

AT = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
PIECES = [[0.1 * i, [0.2, 1.0, 0.0, 0.7, 0.4][i % 5]] for i in range(11)]
FALLING = {"weight_curve": [[0, 1], [1, 0]]}


def linear(*points):
    """As a request holds the host's curve; of points alone it makes a smooth one."""
    return {"points": points, "interpolation": "linear"}


UP_AND_DOWN = linear([0, 0], [0.5, 1], [1, 0.2])


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl", "sdxl70")])
@pytest.mark.parametrize(
    "points", [[[0, 1], [1, 0]], [[0.3, 0.2], [0.5, 2.0], [0.9, -1.0]], PIECES], ids=len
)
def test_a_curve_multiplies_the_weight(comparison, small, family, points):
    weights = [0.1 * (i % 17) for i in range(len(small.LAYERS[family]))]
    compared = comparison(family=family)
    compared.on_model(weight=0.7, layer_weights=weights, weight_curve=linear(*points)).check(at=AT)


def test_it_is_the_hosts_curve(comparison, small):
    """As the Curve Editor hands it over, and also from the points that a request may hold."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import CurveInput

    points = [[0, 0.1], [0.4, 1.0], [1, 0.3]]
    smooth = CurveInput.from_raw(points)
    for given in (smooth, points, {"points": points}):
        compared = comparison().on_model(weight_curve=smooth)
        compared.model = small.apply(
            small.model("tiny"), small.adapter("tiny"), small.images(), weight_curve=given
        )
        compared.check(at=AT)


@pytest.mark.parametrize("sampler", ["euler", "heun", "uni_pc", *nightly("ddim", "dpmpp_2m")])
def test_samplers(comparison, sampler):
    """A curve within a window; heun evaluates every sigma but the last twice."""
    settings = {"weight_curve": UP_AND_DOWN, "start_at": 0.3, "end_at": 0.7}
    comparison().on_model(**settings).check(at=AT, sampler=sampler)


@pytest.mark.parametrize("sampler", ["dpm_2", *nightly("dpmpp_2s_ancestral", "dpmpp_sde")])
def test_samplers_that_evaluate_between_the_runs_sigmas(comparison, small, sampler):
    model, calls = small.counted(small.model("tiny"))
    compared = comparison(model=model).on_model(weight_curve=UP_AND_DOWN)
    compared.check(at=(0.1, 0.4, 0.8), sampler=sampler, tolerance=3e-4)
    assert len(calls) > 3 * 3


@pytest.fixture
def asked(small, monkeypatch):
    """The fractions of the schedule whose sigma the host was asked for."""
    from comfy.model_sampling import ModelSamplingDiscrete

    fractions = []
    percent_to_sigma = ModelSamplingDiscrete.percent_to_sigma

    def counted(self, percent):
        fractions.append(percent)
        return percent_to_sigma(self, percent)

    monkeypatch.setattr(ModelSamplingDiscrete, "percent_to_sigma", counted)
    return fractions


def test_a_curve_asks_the_host_little_and_once_for_all_prompts_that_share_it(small, asked):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import CurveInput

    curve = CurveInput.from_raw(UP_AND_DOWN)
    curve.interp = None  # one place after the other would be thousands of calls
    patched, counts = small.model("tiny"), []
    for seed in (1, 2):
        given = small.adapter("tiny"), small.images(seed=seed)
        patched = small.apply(patched, *given, weight_curve=curve)
        asked.clear()
        small.sample(patched, at=(0.3,))
        counts.append(len(asked))
    assert counts[0] == counts[1] < 500


def test_a_curve_keeps_keys_and_values_once(small):
    """K' and V' beside zeros in each other's place, and no third pack of both."""
    from comfy.patcher_extension import WrappersMP
    from comfyui_ip_adapter.ip_adapter_core.comfyui import decoupled_attention as patch

    held = []

    def look(executor, model, conds, *args, **kwargs):
        held.extend(entry["model_conds"][patch.KEY].prompts for c in conds for entry in c)
        return executor(model, conds, *args, **kwargs)

    patched = small.apply(small.model("tiny"), small.adapter("tiny"), small.images(), **FALLING)
    # Registered later than the pack's own wrapper, it runs within that.
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "look", look)
    small.sample(patched, at=(0.3,))
    size = small.TOKENS * 2 * sum(width for _, width in small.TINY_LAYERS)
    packs = [
        sum(x.numel() for x in vars(prompt).values() if torch.is_tensor(x) and x.numel() >= size)
        for prompts in held
        for prompt in prompts
    ]
    assert packs == [2 * size, 2 * size]


def test_where_a_curve_is_0_nothing_is_added(small):
    model = small.model("tiny")
    curve = linear([0, 0], [0.6, 0], [0.61, 1], [1, 1])
    patched = small.apply(model, small.adapter("tiny"), small.images(), weight_curve=curve)
    for at, equal in (((0.1, 0.4, 0.6), True), ((0.1, 0.4, 0.7), False)):
        assert torch.equal(small.sample(patched, at=at), small.sample(model, at=at)) == equal


def test_conditionings_with_curves_of_their_own(comparison, small):
    compared = comparison(*(small.text(i) for i in (1, 2, 3)))
    compared.on_texts(0, weight_curve=[[0, 0], [1, 1]]).on_texts(1, **FALLING).check(at=AT)


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl", "sdxl70")])
@pytest.mark.parametrize("masks", [0, 1, 3])
def test_weights_per_latent_of_which_the_last_holds(comparison, family, masks):
    settings = {"latent_weights": [0.0, 0.5, -1.5], "weight": 0.8}
    if masks:
        settings["mask"] = 0.2 + 0.8 * torch.rand(masks, 12, 10)
    comparison(family=family).on_model(**settings).check(batch=6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weight_curve": "up"}, "weight_curve is 'up'; expected the output of a Curve Editor"),
        ({"weight_curve": []}, "expected one or more finite"),
        ({"weight_curve": [[0, float("nan")]]}, "expected one or more finite"),
        ({"latent_weights": []}, "one finite number a latent"),
        ({"latent_weights": [1.0, float("inf")]}, "one finite number a latent"),
    ],
    ids=str,
)
def test_values_that_cannot_be(small, settings, message):
    with pytest.raises(ValueError, match=message):
        small.apply(small.model("tiny"), small.adapter("tiny"), small.images(), **settings)


def test_more_weights_than_latents(small):
    given = small.model("tiny"), small.adapter("tiny"), small.images()
    with pytest.raises(ValueError, match=r"3 latent_weights for a batch of 2 latents"):
        small.sample(small.apply(*given, latent_weights=[1.0] * 3), batch=2)


def test_a_mask_is_not_multiplied_out_for_weights_of_latents(small):
    """One mask of the picture's size for all, however many weights there are."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.apply import ApplySettings

    given = small.knobs(mask=torch.rand(64, 64), latent_weights=[0.1 * i for i in range(50)])
    made = ApplySettings(adapter=small.adapter(), image_prompt=small.images(), **given).masks
    assert made.masks.shape == (1, 64, 64) and made.weights.shape == (50,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_keys_and_values_that_the_models_dtype_cannot_hold(small, dtype):
    model = small.model("tiny", dtype=torch.float16, cast=dtype)
    given = small.adapter("tiny"), small.images()
    patched = small.apply(model, *given, weight=5.0, layer_weights=[1e6] * 4)
    if dtype == torch.float32:
        assert small.sample(patched, at=(0.5,)).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"not finite in .*float16.*Lower weight"):
            small.sample(patched, at=(0.5,))
