"""Adapter and model, adapter and image encoder: what does not fit is refused and named."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec
from comfyui_ip_adapter.ip_adapter_core.compatibility import check_encoder, check_fits, fits
from comfyui_ip_adapter.ip_adapter_core.image_prompt import (
    ImageFeatures,
    ImagePrompt,
    describe_encoder,
)

WIDTHS = {"base": 12, "plus": 20, "full": 20}  # that `prompt` has of what each reads


def spec(variant, width=None):
    sizes = {"feature_dim": width or WIDTHS[variant], "cross_attention_dim": 10, "dim": 64}
    return AdapterSpec(variant, tuple(sizes.items()), (8, 16, 8))


def prompt(embed=12, hidden=20, patches=7):
    one = ImageFeatures(torch.randn(1, embed), torch.randn(1, patches, hidden))
    return ImagePrompt(one, one, "a test encoder")


def layers(*widths, context_dim=10):
    return [SimpleNamespace(key=i, dim=x, context_dim=context_dim) for i, x in enumerate(widths)]


@pytest.mark.parametrize(
    "found, said",
    [
        (layers(8, 16, 8), None),
        (layers(), "'a' was made for .*3 cross-.*no UNet cross-attention layers"),
        (layers(8, 16), "over 10-wide text.*UNet.* is a model of 2 cross-attention layers"),
        (layers(*[8] * 16, context_dim=768), r"is SD1\.5 \(16 cross-attention layers"),
        (layers(8, 16, 8, context_dim=12), "over 12-wide text states. Connect a model of the"),
        (layers(8, 8, 16), r"layer 1 \(tensor ip_adapter.3\) is 16 wide, but the model's 1 is 8"),
    ],
)
def test_a_model_of_other_layers_is_refused(found, said):
    assert not fits(spec("base"), found, kolors=True)
    assert fits(spec("base"), found) is (said is None)
    if said is None:
        check_fits(spec("base"), "a", "UNet", found)
        return
    with pytest.raises(ValueError, match=said):
        check_fits(spec("base"), "a", "UNet", found)


@pytest.mark.parametrize(
    "variant, width, trained_with, named",
    [
        ("base", 1024, None, "CLIP ViT-H/14"),
        ("full", 1280, None, "CLIP ViT-H/14"),
        ("base", 77, None, "another"),
        ("base", 1024, "my_tower", "as my_tower gives, but"),
    ],
)
def test_an_encoder_that_does_not_fit_is_named(variant, width, trained_with, named):
    with pytest.raises(ValueError, match=f"'my adapter.bin'.*{width} wide.*{named}") as error:
        check_encoder(spec(variant, width), prompt(), "my adapter.bin", trained_with)
    for words in ("a test encoder", f"{WIDTHS[variant]} wide"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "variant, sizes, said",
    [
        ("base", {"embed": 0}, "reads the encoder's image embedding.*'visual_projection.weight'"),
        (
            "plus",
            {"patches": 0, "hidden": 0},
            "reads the encoder's hidden states.*no vision transformer",
        ),
    ],
)
def test_an_encoder_that_does_not_give_what_is_read(variant, sizes, said):
    with pytest.raises(ValueError, match=f"^'my adapter.bin' {said}") as error:
        check_encoder(spec(variant), prompt(**sizes), "my adapter.bin")
    assert "a test encoder" in str(error.value) and "that this adapter was" in str(error.value)


# Of published encoders, and of some whose embeddings or hidden states are as wide.
VIT_H = {"embed": 1024, "hidden": 1280, "patches": 257}
VIT_BIGG = {"embed": 1280, "hidden": 1664, "patches": 257}
VIT_H_378 = {**VIT_H, "patches": 730}
VIT_G = {**VIT_H, "hidden": 1408}
RN50 = {"embed": 1024, "hidden": 0, "patches": 0}


@pytest.mark.parametrize(
    "variant, width, made_with, expected",
    [
        ("base", 1024, VIT_H, None),
        ("base", 1280, VIT_BIGG, None),
        ("full", 1280, VIT_H, None),
        ("plus", 1280, VIT_H, None),
        ("full", 1280, {**VIT_H, "embed": 0}, None),
        ("base", 768, {**VIT_H, "embed": 768}, None),  # no published adapter reads that
        ("base", 1024, VIT_G, "CLIP ViT-H/14"),
        ("base", 1024, RN50, "CLIP ViT-H/14"),
        ("base", 1024, VIT_H_378, "CLIP ViT-H/14"),
        ("base", 1280, {**VIT_BIGG, "hidden": 1792}, "CLIP ViT-bigG/14"),
        ("full", 1280, VIT_H_378, "CLIP ViT-H/14"),
        ("full", 1280, {**VIT_H, "embed": 640}, "CLIP ViT-H/14"),
    ],
)
def test_another_encoder_of_the_same_width_is_told_once(
    variant, width, made_with, expected, caplog, request
):
    name = request.node.name
    with caplog.at_level(logging.WARNING, "comfyui_ip_adapter"):
        check_encoder(spec(variant, width), prompt(**made_with), name, trained_with="my_tower")
        assert not caplog.messages
        for _ in range(2):
            check_encoder(spec(variant, width), prompt(**made_with), name)
    assert len(caplog.messages) == (0 if expected is None else 1)
    for said in caplog.messages:
        assert all(words in said for words in (name, f"as {expected} gives", "a test encoder"))


@pytest.mark.parametrize(
    "trained_with, told",
    [
        ("open_clip:ViT-H-14/laion2b_s32b_b79k", True),
        ("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", True),
        ("image_encoder", True),  # tells nothing
        ("open_clip:ViT-g-14/laion2b_s34b_b88k", False),
    ],
)
def test_so_it_is_where_the_adapter_names_a_published_one(trained_with, told, caplog):
    check_encoder(spec("base", 1024), prompt(**VIT_G), f"of {trained_with}", trained_with)
    assert len(caplog.messages) == told


def test_quick_gelu_is_told_of_where_the_published_encoder_has_none(caplog):
    made = prompt(**VIT_H)
    for quick in (False, True):
        described = describe_encoder(made.positive, 224, quick)
        check_encoder(spec("base", 1024), replace(made, encoder=described), "quick")
    (said,) = caplog.messages
    assert "the sizes of CLIP ViT-H/14, but quick GELU" in said


@pytest.mark.parametrize("pixels, told", [(336, 0), (224, 1)])
def test_the_encoder_of_kolors(pixels, told, caplog):
    sizes = {"feature_dim": 1024, "cross_attention_dim": 10, "dim": 2048}
    kolors = AdapterSpec("plus", tuple(sizes.items()), (8, 16, 8))
    made = prompt(embed=768, hidden=1024, patches=(pixels // 14) ** 2 + 1)
    made = replace(made, encoder=describe_encoder(made.positive, pixels, quick_gelu=True))
    check_encoder(kolors, made, f"kolors at {pixels} px")
    assert len(caplog.messages) == told
    assert all("as CLIP ViT-L/14 (336 px) gives" in said for said in caplog.messages)
