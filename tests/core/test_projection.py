"""Projections against diffusers' own classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.adapter import PROJECTIONS
from comfyui_ip_adapter.ip_adapter_core.resampler import DIM_HEAD, PerceiverAttention
from diffusers import UNet2DConditionModel
from torch.nn.functional import layer_norm

from tests.support.checkpoint_layouts import full_projection, linear_projection, resampler
from tests.support.random_models import weights as random_weights

PUBLISHED = {
    "sd15": ("base", linear_projection(1024, 768)),
    "sd15_vit-G": ("base", linear_projection(1280, 768)),
    "sd15_full-face": ("full", full_projection(1280, 768)),
    "sd15_plus": ("plus", resampler(1280, 768, 768)),
    "sdxl": ("base", linear_projection(1280, 2048)),
    "sdxl_vit-h": ("base", linear_projection(1024, 2048)),
    "sdxl_plus_vit-h": ("plus", resampler(1280, 2048, 1280)),
}


def build(kind, weights):
    cls = PROJECTIONS[kind]
    module = cls(**cls.sizes(weights), device="meta")
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def features(kind, width, images=3, patches=257):
    shape = (images, width) if kind == "base" else (images, patches, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_agree_with_diffusers(name):
    kind, layout = PUBLISHED[name]
    weights = random_weights(layout)
    convert = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers
    unet = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    theirs = convert(unet, weights).eval().requires_grad_(False)
    ours = build(kind, weights)
    assert sum(p.numel() for p in ours.parameters()) == sum(w.numel() for w in weights.values())
    x = features(kind, PROJECTIONS[kind].sizes(weights)["feature_dim"])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 4, 10])
def test_linear_projection_is_the_formula(tokens):
    weights = random_weights(linear_projection(24, 16, tokens))
    x = features("base", 24).double()
    w = {key: value.double() for key, value in weights.items()}
    y = (x @ w["proj.weight"].T + w["proj.bias"]).reshape(3, tokens, 16)
    truth = layer_norm(y, (16,), w["norm.weight"], w["norm.bias"], eps=1e-5)
    torch.testing.assert_close(build("base", weights).double()(x), truth)


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
