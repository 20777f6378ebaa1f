"""λ that changes over the steps, and from latent to latent, against the explicit truth."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly

AT = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
PIECES = [[0.1 * i, [0.2, 1.0, 0.0, 0.7, 0.4][i % 5]] for i in range(11)]


def line(points, x: float) -> float:
    """Linear between points, written out."""
    before = max((p for p in points if p[0] <= x), key=lambda p: p[0], default=points[0])
    after = min((p for p in points if p[0] >= x), key=lambda p: p[0], default=points[-1])
    if after[0] == before[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (x - before[0]) / (after[0] - before[0])


def curve(points, interpolation="linear"):
    """As the host's Curve Editor hands it over."""
    from comfy_api.input import CurveInput

    return CurveInput.from_raw({"points": points, "interpolation": interpolation})


def compare(small, truth, family, given, wanted, batch=2, images=1, **options):
    """A run with the settings `given` follows the truth of `wanted`."""
    model, adapter, prompt = small.model(family), small.adapter(family), small.images(images)
    texts = small.text(1), small.text(2)
    sides = truth.sides(adapter, prompt, **wanted)
    expected = truth.apply(model, small.LAYERS[family], *zip(texts, sides, strict=True))
    models = small.apply(model, adapter, prompt, **given), expected, model
    truth.check(
        *(small.run(small.guider(m, *texts), at=AT, batch=batch, **options) for m in models)
    )


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl", "sdxl70")])
@pytest.mark.parametrize(
    "points", [[[0, 1], [1, 0]], [[0.3, 0.2], [0.5, 2.0], [0.9, -1.0]], PIECES], ids=len
)
def test_a_curve_multiplies_the_weight(small, truth, family, points):
    steps = {at: line(points, at) for at in AT}
    settings = {
        "weight": 0.7,
        "layer_weights": [0.1 * (i % 17) for i in range(len(small.LAYERS[family]))],
    }
    given = {**settings, "weight_curve": curve(points)}
    compare(small, truth, family, given, {**settings, "steps": steps}, size=8)


def test_it_is_the_hosts_curve(small, truth):
    """Smooth, as the editor draws it, and also from the points that a request may hold."""
    points = [[0, 0.1], [0.4, 1.0], [1, 0.3]]
    smooth = curve(points, "monotone_cubic")
    steps = {at: smooth.interp(at) for at in AT}
    assert max(abs(steps[at] - line(points, at)) for at in AT) > 0.01
    for given in (smooth, points, {"points": points}):
        compare(small, truth, "sd15", {"weight_curve": given}, {"steps": steps})


@pytest.mark.parametrize("sampler", ["heun", *nightly("ddim", "dpmpp_2m")])
def test_samplers(small, truth, sampler):
    """heun evaluates every sigma but the last twice."""
    points = [[0, 0], [0.5, 1], [1, 0.2]]
    steps = {at: line(points, at) for at in AT}
    compare(
        small, truth, "sd15", {"weight_curve": curve(points)}, {"steps": steps}, sampler=sampler
    )


@pytest.mark.parametrize("sampler", ["dpm_2", *nightly("dpmpp_2s_ancestral", "dpmpp_sde")])
def test_samplers_that_evaluate_between_the_runs_sigmas(small, truth, sampler):
    points = [[0, 0], [0.5, 1], [1, 0.2]]
    model, adapter, images = small.model(), small.adapter(), small.images()
    texts, at = (small.text(1), small.text(2)), (0.1, 0.4, 0.8)
    sides = truth.sides(adapter, images, curve=lambda x: line(points, x))
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    patched = small.apply(model, adapter, images, weight_curve=curve(points))
    results = []
    for each in (patched, expected, model):
        watched, calls = small.counted(each)
        results.append(small.run(small.guider(watched, *texts), at=at, sampler=sampler))
        assert len(calls) > len(at)
    truth.check(*results, tolerance=3e-4)


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
    falling = curve([[0, 1], [1, 0]])
    falling.interp = None  # one place after the other would be thousands of calls
    counts = []
    patched = small.model("tiny")
    for seed in (1, 2):
        given = small.adapter("tiny"), small.images(seed=seed)
        patched = small.apply(patched, *given, weight_curve=falling)
        asked.clear()
        small.run(small.guider(patched, small.text(1), small.text(2)), at=(0.3,))
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

    patched = small.apply(
        small.model("tiny"), small.adapter("tiny"), small.images(), weight_curve=[[0, 1], [1, 0]]
    )
    # Registered later than the pack's own wrapper, it runs within that.
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "look", look)
    small.run(small.guider(patched, small.text(1), small.text(2)), at=(0.3,))
    size = small.TOKENS * 2 * sum(width for _, width in small.TINY_LAYERS)
    packs = [
        sum(x.numel() for x in vars(prompt).values() if torch.is_tensor(x) and x.numel() >= size)
        for prompts in held
        for prompt in prompts
    ]
    assert packs == [2 * size, 2 * size]


def test_a_curve_within_a_window(small, truth):
    points = [[0, 0], [1, 1]]
    window = {"start_at": 0.3, "end_at": 0.7}
    steps = {at: line(points, at) for at in AT}
    compare(
        small, truth, "sd15", {**window, "weight_curve": curve(points)}, {**window, "steps": steps}
    )


def test_where_a_curve_is_0_nothing_is_added(small):
    model, texts = small.model(), (small.text(1), small.text(2))
    points = [[0, 0], [0.6, 0], [0.61, 1], [1, 1]]
    patched = small.apply(model, small.adapter(), small.images(), weight_curve=curve(points))
    early, late = (0.1, 0.4, 0.6), (0.1, 0.4, 0.7)
    for at, equal in ((early, True), (late, False)):
        found, plain = (small.run(small.guider(m, *texts), at=at) for m in (patched, model))
        assert torch.equal(found, plain) == equal


def test_ten_pieces_add_no_unet_call(small):
    model, texts = small.model(), (small.text(1), small.text(2))
    counts = []
    for m in (model, small.apply(model, small.adapter(), small.images(), weight_curve=PIECES)):
        watched, calls = small.counted(m)
        small.run(small.guider(watched, *texts), at=[i / 20 for i in range(20)], batch=1)
        counts.append(calls)
    assert counts[0] == counts[1] and len(counts[0]) == 20


def test_conditionings_with_curves_of_their_own(small, truth):
    model, adapter, images = small.model(), small.adapter(), small.images()
    positive, other, negative = (small.text(i) for i in (1, 2, 3))
    rising, falling = [[0, 0], [1, 1]], [[0, 1], [1, 0]]
    first = truth.sides(adapter, images, steps={at: line(rising, at) for at in AT})
    second = truth.sides(adapter, images, steps={at: line(falling, at) for at in AT})
    expected = truth.apply(
        model,
        small.SD15_LAYERS,
        (positive, first[0]),
        (other, second[0]),
        (negative, first[1] + second[1]),
    )
    patched, one, uncond = small.apply_conditioning(
        model, positive, negative, adapter, images, weight_curve=curve(rising)
    )
    patched, two, uncond = small.apply_conditioning(
        patched, other, uncond, adapter, images, weight_curve=curve(falling)
    )
    truth.check(
        small.run(small.guider(patched, one + two, uncond), at=AT),
        *(small.run(small.guider(m, positive + other, negative), at=AT) for m in (expected, model)),
    )


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl", "sdxl70")])
@pytest.mark.parametrize("masks", [0, 1, 3])
def test_weights_per_latent_of_which_the_last_holds(small, truth, family, masks):
    settings = {"latent_weights": [0.0, 0.5, -1.5], "weight": 0.8}
    if masks:
        generator = torch.Generator().manual_seed(masks)
        settings["mask"] = 0.2 + 0.8 * torch.rand(masks, 12, 10, generator=generator)
    compare(small, truth, family, settings, settings, batch=6)


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
        small.apply(small.model(), small.adapter(), small.images(), **settings)


def test_more_weights_than_latents(small):
    model = small.apply(small.model(), small.adapter(), small.images(), latent_weights=[1.0] * 3)
    with pytest.raises(ValueError, match=r"3 latent_weights for a batch of 2 latents"):
        small.run(small.guider(model, small.text(1), small.text(2)), batch=2)


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
    patched = small.apply(model, *given, weight=5.0, layer_weights=[1e6] * 2)
    guider = small.guider(patched, small.text(1), small.text(2))
    if dtype == torch.float32:
        assert small.run(guider, at=(0.5,)).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"not finite in .*float16.*Lower weight"):
            small.run(guider, at=(0.5,))
