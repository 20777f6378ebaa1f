"""The UNet's and the adapter's precision."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly


def run(small, model, *texts):
    return small.run(small.guider(model, *texts))


# For the steps and latents of `run`; the truth knows a curve by its values at the steps.
OVER_TIME = {
    "plain": ({}, {}),
    "mask": ({"mask": torch.rand(1, 10, 10)},) * 2,
    "curve": ({"weight_curve": [[0.3, 1.0], [0.6, 0.3]]}, {"steps": {0.3: 1.0, 0.6: 0.3}}),
    "weights of latents": ({"latent_weights": [1.0, -0.4]},) * 2,
}


@pytest.mark.parametrize("case", OVER_TIME)
@pytest.mark.parametrize("dtype", [torch.float16, *nightly(torch.bfloat16)], ids=str)
def test_half_precision_weights_cast_as_the_host_does_on_a_cpu(small, truth, dtype, case):
    """Exactly the float32 result of the same rounded weights."""
    texts, adapter, images = (small.text(1), small.text(2)), small.adapter(), small.images()
    model = small.model(dtype=dtype, cast=torch.float32)
    reference = small.model(seed=99)  # its own, since its weights are replaced
    weights = model.model.diffusion_model.state_dict()
    reference.model.diffusion_model.load_state_dict({k: v.float() for k, v in weights.items()})
    settings, wanted = OVER_TIME[case]
    sides = truth.sides(adapter, images, weight=0.8, **wanted)
    expected = truth.apply(reference, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    patched = small.apply(model, adapter, images, weight=0.8, **settings)
    truth.check(*(run(small, m, *texts) for m in (patched, expected, reference)))


def test_float64(small, truth):
    model, adapter, images = small.model(dtype=torch.float64), small.adapter(), small.images()
    texts = small.text(1), small.text(2)
    sides = truth.sides(adapter, images)
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, sides, strict=True))
    patched = small.apply(model, adapter, images)
    truth.check(*(run(small, m, *texts) for m in (patched, expected, model)), tolerance=1e-5)


@pytest.mark.parametrize("case", OVER_TIME)
def test_bfloat16_computation(small, case):
    """Everything in bfloat16: near float32, and the pack adds tensors of no other dtype."""
    settings = OVER_TIME[case][0]
    texts, adapter, images = (small.text(1), small.text(2)), small.adapter(), small.images()
    half, full = small.model(dtype=torch.bfloat16), small.model()
    results = [
        run(small, small.apply(m, adapter, images, weight=2.0, **settings), *texts)
        for m in (half, full)
    ]
    change = float((results[1] - run(small, full, *texts)).abs().max())
    assert float((results[0] - results[1]).abs().max()) < 0.2 * change


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_adapters(small, dtype):
    """As published files are stored: computed in float32 from the rounded weights."""
    texts, images = (small.text(1), small.text(2)), small.images()
    stored, rounded = small.adapter(), small.adapter()
    stored.module.to(dtype)
    for weight in rounded.module.parameters():
        weight.data = weight.data.to(dtype).float()
    found, expected = (
        run(small, small.apply(small.model(), adapter, images), *texts)
        for adapter in (stored, rounded)
    )
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
