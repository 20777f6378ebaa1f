"""Images and masks of single latents stay with them, also where parts of a batch are sampled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.sets import nightly


def masks(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(1, count, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (20, 28), mode="bilinear")[0]


def windowed(model, schedule, fix):
    """The host's context windows over a batch of frames: 4 at a time, 2 shared."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return ContextWindowsManualNode.execute(
        model=model,
        context_length=4,
        context_overlap=2,
        context_schedule=schedule,
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        dim=0,
        freenoise=False,
        causal_window_fix=fix,
    ).args[0]


@pytest.mark.parametrize(
    "pictures, mask_count", [(2, None), (4, 2), (1, 4), *nightly((4, None), (1, None))]
)
@pytest.mark.parametrize("route", ["model", "conditioning"])
def test_one_image_per_latent(small, truth, route, pictures, mask_count):
    model, adapter, images = small.model(), small.adapter(), small.images(pictures)
    mask = None if mask_count is None else masks(mask_count)
    settings = {"combine": "per_latent", "mask": mask}
    texts = small.text(1), small.text(2)
    sides = truth.sides(adapter, images, **settings)
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    if route == "model":
        patched = small.apply(model, adapter, images, **settings), *texts
    else:
        patched = small.apply_conditioning(model, *texts, adapter, images, **settings)
    runs = patched, (expected, *texts), (model, *texts)
    truth.check(*(small.run(small.guider(*given), batch=4) for given in runs))


def test_latent_i_takes_image_i_mod_their_number(small):
    """Said once without the truth: latents of the same noise and image are the same."""
    model = small.apply(small.model(), small.adapter(), small.images(2), combine="per_latent")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).expand(
        4, -1, -1, -1
    )
    guider = small.guider(model, small.text(1), small.text(2))
    a, b, c, d = small.run(guider, batch=4, noise=noise)
    assert torch.allclose(a, c, atol=1e-4) and torch.allclose(b, d, atol=1e-4)
    assert not torch.allclose(a, b, atol=1e-1)


ALWAYS, SECOND = {}, {"start_at": 0.5, "end_at": 0.7}


@pytest.mark.parametrize(
    "schedule, fix, settings",
    [
        ("standard_static", True, ALWAYS),
        ("standard_static", False, SECOND),
        *nightly(("looped_uniform", True, SECOND), ("batched", False, ALWAYS)),
    ],
)
def test_context_windows(small, truth, schedule, fix, settings):
    settings = {**settings, "combine": "per_latent", "mask": masks(7)}
    model, adapter, images = small.model(), small.adapter(), small.images(7)
    texts = small.text(1), small.text(2)
    sides = truth.sides(adapter, images, **settings)
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    patched = small.apply(model, adapter, images, **settings)
    truth.check(
        *(
            small.run(small.guider(windowed(m, schedule, fix), *texts), batch=7)
            for m in (patched, expected, model)
        )
    )


def test_an_animation_in_context_windows(small, truth):
    """An image and a weight a frame, and a weight that falls while it is sampled."""
    settings = {"latent_weights": [0.2 * i for i in range(7)], "combine": "per_latent"}
    model, adapter, images = small.model(), small.adapter(), small.images(7)
    texts = small.text(1), small.text(2)
    falling = {"points": [[0, 1], [1, 0]], "interpolation": "linear"}
    sides = truth.sides(adapter, images, steps={0.3: 0.7, 0.6: 0.4}, **settings)
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    patched = small.apply(model, adapter, images, weight_curve=falling, **settings)
    truth.check(
        *(
            small.run(small.guider(windowed(m, "standard_static", True), *texts), batch=7)
            for m in (patched, expected, model)
        )
    )


def test_a_curve_multiplies_the_rows_of_a_window_alone(small):
    width, rows = 2 * sum(width for _, width in small.TINY_LAYERS), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "addcmul" in str(func) and out.shape[-1] == width:
                rows.append(len(out))
            return out

    given = small.adapter("tiny"), small.images(7)
    falling = {"weight_curve": [[0, 1], [1, 0]], "combine": "per_latent"}
    patched = small.apply(small.model("tiny"), *given, **falling)
    guider = small.guider(windowed(patched, "standard_static", False), small.text(1), small.text(2))
    with Watch():
        small.run(guider, batch=7)
    assert max(rows) == 4


def test_context_windows_with_prompts_in_the_conditioning(small, truth):
    model, adapter, images = small.model(), small.adapter(), small.images(6)
    texts = small.text(1), small.text(2)
    sides = truth.sides(adapter, images, combine="per_latent")
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    patched = small.apply_conditioning(model, *texts, adapter, images, combine="per_latent")
    runs = patched, (expected, *texts), (model, *texts)
    truth.check(
        *(
            small.run(small.guider(windowed(m, "standard_static", True), *conds), batch=6)
            for m, *conds in runs
        )
    )


@pytest.mark.parametrize("fix", [True, False])
@pytest.mark.parametrize("what", ["images", "masks"])
def test_context_windows_with_a_text_that_the_guider_does_not_know(small, truth, what, fix):
    from comfy_extras.nodes_perpneg import PerpNeg

    settings = {"combine": "per_latent"} if what == "images" else {"mask": masks(6)}
    model, adapter, images = small.model(), small.adapter(), small.images(6)
    if what == "images":  # the zero images too, or all latents had the same negative side
        images = replace(images, negative=small.images(6, seed=5).positive)
    texts = small.text(1), small.text(2), small.text(3)
    positive, negative = truth.sides(adapter, images, **settings)
    sides = positive, negative, negative
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    latents = []
    for m in (small.apply(model, adapter, images, **settings), expected, model):
        (m,) = PerpNeg.execute(m, texts[2], 1.0).args
        guider = small.guider(windowed(m, "standard_static", fix), *texts[:2])
        latents.append(small.run(guider, batch=6))
    truth.check(*latents)


@pytest.mark.parametrize("what", ["images", "masks"])
def test_numbers_that_cannot_be_dealt_out(small, what):
    settings = {"combine": "per_latent"} if what == "images" else {"mask": masks(3)}
    model = small.apply(small.model(), small.adapter(), small.images(3), **settings)
    guider = small.guider(model, small.text(1), small.text(2))
    with pytest.raises(ValueError, match=f"3 {what} .* batch of 4 latents"):
        small.run(guider, batch=4)
    assert small.run(guider, batch=3).isfinite().all()  # and the guider is as good as before
