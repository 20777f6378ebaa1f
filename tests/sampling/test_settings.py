"""λ, layer weights, several images and masks of any shape, against the explicit truth."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly


def mask(*shape: int) -> torch.Tensor:
    return 0.2 + 0.8 * torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(small, truth, images=1, family="sd15", size=8, **settings):
    model, adapter = small.model(family), small.adapter(family)
    prompt = small.images(images)
    texts = small.text(1), small.text(2)
    patched = small.apply(model, adapter, prompt, **settings)
    if settings.get("mask") is not None:
        settings["mask"] = settings["mask"].reshape(-1, *settings["mask"].shape[-2:])
    sides = truth.sides(adapter, prompt, **settings)
    expected = truth.apply(model, small.LAYERS[family], *zip(texts, sides, strict=True))
    truth.check(
        *(small.run(small.guider(m, *texts), size=size) for m in (patched, expected, model))
    )


@pytest.mark.parametrize("weight", [0.3, -1.0, 2.5])
@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl")])
def test_weight(small, truth, family, weight):
    check(small, truth, family=family, weight=weight)


@pytest.mark.parametrize("combine, images", [("concat", 3), ("average", 3), ("per_latent", 2)])
def test_several_images(small, truth, combine, images):
    check(small, truth, images, combine=combine, weight=0.8)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_layer_weights_are_in_checkpoint_order(small, truth, family):
    weights = [0.2 * i - 1 for i in range(len(small.LAYERS[family]))]
    check(small, truth, family=family, layer_weights=weights)


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl")])
@pytest.mark.parametrize("layer", [0, -2, -1], ids=["first down", "last up", "middle"])
def test_every_layer_contributes(small, truth, family, layer):
    weights = [0.0] * len(small.LAYERS[family])
    weights[layer] = 4.0
    check(small, truth, family=family, layer_weights=weights)


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
def test_masks_of_any_size_on_latents_of_any_size(small, truth, shape, size):
    check(small, truth, size=size, mask=mask(*shape))


def test_a_mask_is_sampled_once_for_all_steps_and_both_sides(small, monkeypatch):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import masks

    sampled, before = [], masks.mask_levels
    monkeypatch.setattr(masks, "mask_levels", lambda *a: sampled.append(a) or before(*a))
    model = small.apply(small.model(), small.adapter(), small.images(), mask=mask(1, 64, 64))
    small.run(small.guider(model, small.text(1), small.text(2)), at=(0.2, 0.5, 0.8))
    assert len(sampled) == 1


def test_a_mask_of_ones_is_no_mask(small):
    model, adapter, images = small.model(), small.adapter(), small.images()
    with_mask, without = (
        small.run(
            small.guider(small.apply(model, adapter, images, mask=m), small.text(1), small.text(2))
        )
        for m in (torch.ones(1, 64, 64), None)
    )
    assert torch.allclose(with_mask, without, rtol=1e-4, atol=1e-3)


def test_two_adapters(small, truth):
    """A second adapter of another number of tokens, on the same model."""
    model, texts = small.model(), (small.text(1), small.text(2))
    first, second = small.adapter(), small.adapter(seed=11, tokens=7)
    one = {"weight": 0.6, "mask": mask(1, 8, 8)}
    two = {"weight": 0.9, "end_at": 0.5}
    a, b = truth.sides(first, small.images(), **one), truth.sides(second, small.images(2), **two)
    expected = truth.apply(
        model, small.SD15_LAYERS, (texts[0], a[0] + b[0]), (texts[1], a[1] + b[1])
    )
    patched = small.apply(model, first, small.images(), **one)
    patched = small.apply(patched, second, small.images(2), **two)
    truth.check(*(small.run(small.guider(m, *texts)) for m in (patched, expected, model)))
