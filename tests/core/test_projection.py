"""Projections against diffusers' own classes, and against the formula in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.adapter import PROJECTIONS
from diffusers import UNet2DConditionModel
from torch.nn.functional import gelu, layer_norm

from tests.support.checkpoint_layouts import full_projection, linear_projection, resampler

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
def test_published_sizes_agree_with_diffusers(name, random_weights):
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
def test_linear_projection_is_the_formula(tokens, random_weights):
    weights = random_weights(linear_projection(24, 16, tokens))
    x = features("base", 24).double()
    w = {key: value.double() for key, value in weights.items()}
    y = (x @ w["proj.weight"].T + w["proj.bias"]).reshape(3, tokens, 16)
    truth = layer_norm(y, (16,), w["norm.weight"], w["norm.bias"], eps=1e-5)
    torch.testing.assert_close(build("base", weights).double()(x), truth)


@pytest.mark.parametrize("patches", [1, 5, 257])
def test_full_projection_is_the_formula_with_exact_gelu(patches, random_weights):
    weights = random_weights(full_projection(24, 16))
    x = 3 * features("full", 24, patches=patches).double()
    w = {key: value.double() for key, value in weights.items()}
    hidden = gelu(x @ w["proj.0.weight"].T + w["proj.0.bias"], approximate="none")
    y = hidden @ w["proj.2.weight"].T + w["proj.2.bias"]
    truth = layer_norm(y, (16,), w["proj.3.weight"], w["proj.3.bias"], eps=1e-5)
    torch.testing.assert_close(build("full", weights).double()(x), truth)


@pytest.mark.parametrize(
    "kind, layout",
    [
        ("base", linear_projection(24, 16)),
        ("full", full_projection(24, 16)),
        ("plus", resampler(24, 16, 64)),
    ],
)
def test_images_do_not_see_each_other(kind, layout, random_weights):
    module = build(kind, random_weights(layout))
    x = features(kind, 24, patches=9)
    alone = torch.cat([module(image[None]) for image in x])
    torch.testing.assert_close(module(x), alone, rtol=1e-4, atol=1e-5)
