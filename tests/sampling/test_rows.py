"""Each row of a UNet call has the images of its text and its latent, and no call is made more.

Regions: masks of images are cut with areas. Where one side of guidance has an area and the other
has none, the host adds an opposite of that area, made of the other side's text.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.sampling import regions
from tests.support.sets import nightly

WINDOWS = {"always": {}, "second step": {"start_at": 0.5, "end_at": 0.7}}
BOTH_WINDOWS = ["second step", *nightly("always")]
UNEQUAL = [(77, 154), (385, 77), *nightly(((154, 77),), ((77, 385),))]


@pytest.fixture(params=["on_model", "on_texts"])
def route(request):
    return request.param


def masks(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(1, count, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (20, 28), mode="bilinear")[0]


@pytest.mark.parametrize("window", BOTH_WINDOWS)
def test_every_guidance(comparison, small, guidances, memory, guidance, window):
    compared = comparison(*(small.text(i) for i in range(3)))
    # The middle conditioning of DualCFG stands for a prompt; PerpNeg's empty one for none.
    positives = 1 if guidance is guidances.perp_neg else 2
    prompt = small.images(2)
    compared.on_model(positives, image_prompt=prompt, weight=0.7, **WINDOWS[window])
    compared.check(guidance, size=16)  # self-attention guidance skips smaller latents


@pytest.mark.parametrize("name", ["cfg", "dual_cfg", "perp_neg"])
def test_a_reference_for_each_text(comparison, small, guidances, memory, name):
    compared = comparison(*(small.text(i) for i in range(3)))
    compared.on_texts(0, image_prompt=small.images(seed=1))
    compared.on_texts(1, None, image_prompt=small.images(seed=2), **WINDOWS["second step"])
    compared.check(getattr(guidances, name))


@pytest.mark.parametrize("sides", [(0, None), (None, 2), (0, 2)], ids=str)
def test_only_some_texts_have_images(comparison, small, memory, sides):
    compared = comparison(*(small.text(i) for i in range(3)))
    compared.on_texts(*sides, end_at=0.4).check(at=(0.2, 0.4, 0.6))


@pytest.mark.parametrize("lengths", UNEQUAL, ids=str)
@pytest.mark.parametrize("window", BOTH_WINDOWS)
def test_prompts_of_unequal_length(comparison, small, lengths, window):
    texts = [small.text(i, length) for i, length in enumerate(lengths)]
    comparison(*texts).on_model(**WINDOWS[window]).check()


def test_sdxl_with_pooled_text(comparison, small, guidances):
    compared = comparison(*(small.text(i) for i in range(3)), family="sdxl")
    compared.on_model(weight=-0.5).check(guidances.perp_neg)


def test_a_text_that_the_guider_does_not_know_gets_the_zero_image(comparison, small, empty_text):
    compared = comparison(*(small.text(i) for i in range(3))).on_model()
    compared.check(lambda model, a, b, empty: small.guider(empty_text(model, empty), a, b))


@pytest.mark.parametrize("window", BOTH_WINDOWS)
def test_regions(comparison, regional, window):
    compared = comparison(*regional, family="sd15")
    compared.on_model(mask=regions.image_mask(), weight=1.3, **WINDOWS[window])
    compared.check(size=regions.SIZE)


@pytest.mark.parametrize("both", [True, False], ids=["each", "one"])
def test_regions_with_references_of_their_own(comparison, small, regional, both):
    positive, negative = regional
    compared = comparison(positive[:1], positive[1:], negative, family="sd15")
    if both:
        compared.on_texts(0, image_prompt=small.images(seed=1), start_at=0.5)
    compared.on_texts(1, weight=0.6, mask=regions.image_mask(), end_at=0.5)
    compared.check(size=regions.SIZE)


def test_one_image_from_the_model_and_another_from_a_regions_text(comparison, small):
    positive, negative = regions.texts(small, "area over all")
    compared = comparison(positive[:1], positive[1:], negative, family="sd15")
    compared.on_model(2, image_prompt=small.images(seed=1), weight=0.5, end_at=0.4)
    compared.on_texts(1, image_prompt=small.images(2, seed=2), mask=regions.image_mask())
    compared.check(size=regions.SIZE)


@pytest.mark.parametrize(
    "pictures, mask_count", [(2, None), (4, 2), (1, 4), *nightly((4, None), (1, None))]
)
def test_one_image_per_latent(comparison, small, route, pictures, mask_count):
    settings = {"image_prompt": small.images(pictures), "combine": "per_latent"}
    if mask_count:
        settings["mask"] = masks(mask_count)
    getattr(comparison(), route)(**settings).check(batch=4)


def test_latent_i_takes_image_i_mod_their_number(small):
    """Said once without the truth: latents of the same noise and image are the same."""
    given = small.model("tiny"), small.adapter("tiny"), small.images(2)
    noise = torch.randn(1, 4, 8, 8).expand(4, -1, -1, -1)
    a, b, c, d = small.sample(small.apply(*given, combine="per_latent"), noise=noise)
    assert torch.allclose(a, c, atol=1e-4) and torch.allclose(b, d, atol=1e-4)
    assert not torch.allclose(a, b, atol=1e-1)


@pytest.mark.parametrize(
    "schedule, fix, window",
    [
        ("standard_static", True, "always"),
        ("standard_static", False, "second step"),
        *nightly(("looped_uniform", True, "second step"), ("batched", False, "always")),
    ],
)
def test_context_windows(comparison, small, windowed, schedule, fix, window):
    settings = {"combine": "per_latent", "mask": masks(7), **WINDOWS[window]}
    compared = comparison().on_model(image_prompt=small.images(7), **settings)
    compared.check(change=lambda model: windowed(model, schedule, fix), batch=7)


def test_an_animation_in_context_windows(comparison, small, windowed, route):
    """An image and a weight a frame, and a weight that falls while it is sampled."""
    settings = {"latent_weights": [0.2 * i for i in range(7)], "weight_curve": [[0, 1], [1, 0]]}
    compared = getattr(comparison(), route)(
        image_prompt=small.images(7), combine="per_latent", **settings
    )
    compared.check(change=windowed, batch=7)


def test_a_curve_multiplies_the_rows_of_a_window_alone(small, windowed):
    width, rows = 2 * sum(width for _, width in small.TINY_LAYERS), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "addcmul" in str(func) and out.shape[-1] == width:
                rows.append(len(out))
            return out

    given = small.model("tiny"), small.adapter("tiny"), small.images(7)
    patched = small.apply(*given, weight_curve=[[0, 1], [1, 0]], combine="per_latent")
    with Watch():
        small.sample(windowed(patched, fix=False), batch=7)
    assert max(rows) == 4


@pytest.mark.parametrize("fix", [True, False])
@pytest.mark.parametrize("what", ["images", "masks"])
def test_context_windows_with_a_text_that_the_guider_does_not_know(
    comparison, small, windowed, empty_text, what, fix
):
    prompt = small.images(6)
    if what == "images":  # the zero images too, or all latents had the same negative side
        prompt = replace(prompt, negative=small.images(6, seed=5).positive)
    settings = {"combine": "per_latent"} if what == "images" else {"mask": masks(6)}
    compared = comparison(*(small.text(i) for i in range(3)))
    compared.on_model(image_prompt=prompt, **settings)

    def guider(model, positive, negative, empty):
        model = windowed(empty_text(model, empty), fix=fix)
        return small.guider(model, positive, negative)

    compared.check(guider, batch=6)


@pytest.mark.parametrize("what", ["images", "masks"])
def test_numbers_that_cannot_be_dealt_out(small, what):
    settings = {"combine": "per_latent"} if what == "images" else {"mask": masks(3)}
    model = small.apply(small.model("tiny"), small.adapter("tiny"), small.images(3), **settings)
    guider = small.guider(model, small.text(1), small.text(2))
    with pytest.raises(ValueError, match=f"3 {what} .* batch of 4 latents"):
        small.run(guider, batch=4)
    assert small.run(guider, batch=3).isfinite().all()  # and the guider is as good as before
