"""The fine-grained query network against an explicit float64 perceiver."""

from __future__ import annotations

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.resampler import DIM_HEAD, PerceiverAttention, Resampler
from torch.nn.functional import gelu, layer_norm

from tests.support.checkpoint_layouts import resampler


def norm(x, w, name):
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def perceiver(features, latents, w, name):
    """One attention, head by head, with the plain scale on the scores."""
    seen = torch.cat([norm(features, w, f"{name}.norm1"), norm(latents, w, f"{name}.norm2")], 1)
    query = norm(latents, w, f"{name}.norm2") @ w[f"{name}.to_q.weight"].T
    key, value = (seen @ w[f"{name}.to_kv.weight"].T).tensor_split(2, dim=-1)
    heads = []
    for h in range(query.shape[-1] // 64):
        q, k, v = (x[..., 64 * h : 64 * h + 64] for x in (query, key, value))
        heads.append((q @ k.mT / 64**0.5).softmax(-1) @ v)
    return torch.cat(heads, -1) @ w[f"{name}.to_out.weight"].T


def truth(x, weights):
    w = {key: value.double() for key, value in weights.items()}
    features = x.double() @ w["proj_in.weight"].T + w["proj_in.bias"]
    latents = w["latents"].expand(len(x), -1, -1)
    depth = sum(key.endswith("to_q.weight") for key in w)
    for i in range(depth):
        latents = latents + perceiver(features, latents, w, f"layers.{i}.0")
        hidden = norm(latents, w, f"layers.{i}.1.0") @ w[f"layers.{i}.1.1.weight"].T
        latents = latents + gelu(hidden) @ w[f"layers.{i}.1.3.weight"].T
    return norm(latents @ w["proj_out.weight"].T + w["proj_out.bias"], w, "norm_out")


@pytest.mark.parametrize("features, context, width, tokens", [(40, 24, 128, 16), (48, 32, 192, 5)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_resampler_is_the_formula(
    features, context, width, tokens, dtype, tolerance, random_weights
):  # in float64 too the softmax is taken in float32, as in the reference
    weights = random_weights(resampler(features, context, width, tokens))
    module = Resampler(**Resampler.sizes(weights)).to(dtype)
    module.load_state_dict(weights)
    x = torch.randn(3, 17, features, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = module(x)
    assert found.shape == (3, tokens, context)
    torch.testing.assert_close(found.double(), truth(x, weights), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "layout, millions",
    [(resampler(1280, 768, 768), 29.92), (resampler(1280, 2048, 1280), 82.96)],
    ids=["sd15", "sdxl"],
)
def test_published_sizes(layout, millions):
    meta = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
    module = Resampler(**Resampler.sizes(meta), device="meta")
    state = module.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == layout
    assert len(state) == 51
    assert round(sum(value.numel() for value in state.values()) / 1e6, 2) == millions


def test_scores_do_not_overflow_half_precision():
    """q·k reaches 64 · 60 · 60, beyond float16; scaled, 64 times less than its square root."""
    layer = PerceiverAttention(DIM_HEAD, heads=1).half()
    with torch.no_grad():
        layer.to_q.weight.copy_(7.5 * torch.eye(DIM_HEAD))
        layer.to_kv.weight.copy_(torch.cat([7.5 * torch.eye(DIM_HEAD), torch.eye(DIM_HEAD)]))
        for module in (layer.norm1, layer.norm2):
            module.weight.fill_(8.0)
        generator = torch.Generator().manual_seed(0)
        features, latents = (torch.randn(1, n, DIM_HEAD, generator=generator) for n in (6, 2))
        found = layer(features.half(), latents.half())
        expected = layer.double()(features.half().double(), latents.half().double())
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
