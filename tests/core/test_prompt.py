"""From features to packed K'/V': combining images, λ, packing."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter
from comfyui_ip_adapter.ip_adapter_core.attention import image_attention
from comfyui_ip_adapter.ip_adapter_core.compatibility import check_encoder
from comfyui_ip_adapter.ip_adapter_core.image_prompt import (
    ImageFeatures,
    ImagePrompt,
    describe_encoder,
)
from comfyui_ip_adapter.ip_adapter_core.packing import fold, layer_weights, tokens, unpack

DIMS = (8, 16, 8)
KINDS = {
    "base": {"feature_dim": 12, "cross_attention_dim": 10, "tokens": 4},
    "full": {"feature_dim": 20, "cross_attention_dim": 10},
    "plus": {
        "feature_dim": 20,
        "cross_attention_dim": 10,
        "tokens": 5,
        "dim": 64,
        "depth": 2,
        "heads": 1,
    },
}


@pytest.fixture(params=KINDS)
def adapter(request):
    torch.manual_seed(0)
    spec = AdapterSpec(request.param, tuple(KINDS[request.param].items()), DIMS)
    return IPAdapter(spec).requires_grad_(False)


def prompt(images, negatives=1, patches=7, embed=12, hidden=20):
    generator = torch.Generator().manual_seed(images + 10 * negatives)

    def side(n):
        shapes = (n, embed), (n, patches, hidden)
        return ImageFeatures(*(torch.randn(shape, generator=generator) for shape in shapes))

    return ImagePrompt(side(images), side(negatives), "a test encoder")


def read(adapter, features, row=slice(None)):
    return adapter.tokens(getattr(features, adapter.spec.features)[row])


@pytest.mark.parametrize("images, negatives", [(1, 1), (3, 1), (3, 3), (2, 3), (1, 4)])
def test_concat_lays_images_side_by_side_without_changing_attention(adapter, images, negatives):
    given = prompt(images, negatives)
    sides = tokens(adapter, given, "concat")
    lengths = sorted(side.shape[1] for side in sides)
    if max(images, negatives) % min(images, negatives) == 0:
        assert lengths[0] == lengths[1]
    else:  # no more tokens than there are: sides of 7 and 5 images would take 35 each
        assert sum(lengths) == sum(
            read(adapter, side).flatten(0, 1).shape[0] for side in (given.positive, given.negative)
        )
    query = torch.randn(1, 6, 10)
    for side, features in zip(sides, (given.positive, given.negative), strict=True):
        truth = torch.cat([read(adapter, features, slice(i, i + 1)) for i in range(len(features))])
        truth = truth.reshape(1, -1, 10)
        torch.testing.assert_close(side[:, : truth.shape[1]], truth)
        torch.testing.assert_close(
            image_attention(query, side, side, 1), image_attention(query, truth, truth, 1)
        )


@pytest.mark.parametrize("images, negatives", [(1, 1), (3, 1), (3, 2)])
def test_average_is_the_mean_of_features_not_of_tokens(adapter, images, negatives):
    given = prompt(images, negatives)
    for side, features in zip(
        tokens(adapter, given, "average"), (given.positive, given.negative), strict=True
    ):
        mean = getattr(features, adapter.spec.features).mean(0, keepdim=True)
        torch.testing.assert_close(side, adapter.tokens(mean))


@pytest.mark.parametrize("negatives", [1, 3])
def test_per_latent_keeps_one_row_an_image(adapter, negatives):
    given = prompt(3, negatives)
    positive, negative = tokens(adapter, given, "per_latent")
    torch.testing.assert_close(positive, read(adapter, given.positive))
    torch.testing.assert_close(negative, read(adapter, given.negative))
    assert (len(positive), len(negative)) == (3, negatives)


@pytest.mark.parametrize(
    "combine, negatives, said",
    [
        ("per_latent", 2, "found 3 images and 2 negative images"),
        ("blend", 1, "'blend'; expected one of concat, average, per_latent"),
    ],
)
def test_what_cannot_be_combined(adapter, combine, negatives, said):
    with pytest.raises(ValueError, match=said):
        tokens(adapter, prompt(3, negatives), combine)


@pytest.mark.parametrize("weight", [0.3, 1.0, -0.7])
def test_fold_scales_values_only_and_unpack_inverts_it(adapter, weight):
    given = adapter.tokens(getattr(prompt(2).positive, adapter.spec.features))
    truth = list(adapter.keys_values(given))
    packed = fold(truth, [weight, 2 * weight, 0.0])
    assert packed.shape == (2, given.shape[1], 2 * sum(DIMS))
    found = unpack(packed, DIMS)
    for (key, value), (k, v), factor in zip(found, truth, [1, 2, 0], strict=True):
        assert torch.equal(key, k)
        torch.testing.assert_close(value, weight * factor * v)
        assert key.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


@pytest.mark.parametrize("weight", [0.3, -2.0])
def test_folding_a_weight_is_scaling_the_attention(adapter, weight):
    keys_values = list(adapter.keys_values(read(adapter, prompt(1).positive)))
    folded = unpack(fold(keys_values, [weight] * 3), DIMS)
    for dim, (key, value), (k, v) in zip(DIMS, keys_values, folded, strict=True):
        query = torch.randn(1, 6, dim)
        expected = weight * image_attention(query, key, value, 2)
        torch.testing.assert_close(image_attention(query, k, v, 2), expected)


def test_fold_wants_a_weight_for_every_layer(adapter):
    keys_values = list(adapter.keys_values(read(adapter, prompt(1).positive)))
    with pytest.raises(ValueError, match="zip"):
        fold(keys_values, [1.0, 1.0])


@pytest.mark.parametrize("layers, expected", [(None, [0.5] * 3), ([0, 1, -2.0], [0, 0.5, -1])])
def test_layer_weights(adapter, layers, expected):
    assert layer_weights(adapter.spec, 0.5, layers) == expected


@pytest.mark.parametrize(
    "weight, layers, said",
    [
        (1.0, [1.0] * 2, "2 values, but the adapter has 3 cross-attention layers"),
        (1.0, [1.0] * 4, "4 values, but the adapter has 3 cross-attention layers"),
        (1.0, [], "0 values"),
        (math.nan, None, "finite.*weight nan"),
        (math.inf, None, "finite.*weight inf"),
        (0.5, [1.0, math.nan, 1.0], r"finite.*layer_weights \[1.0, nan, 1.0\]"),
    ],
)
def test_layer_weights_that_cannot_be(adapter, weight, layers, said):
    with pytest.raises(ValueError, match=said):
        layer_weights(adapter.spec, weight, layers)


@pytest.mark.parametrize(
    "projection, width, named",
    [("base", 1024, "CLIP ViT-H/14"), ("full", 1280, "CLIP ViT-H/14"), ("base", 77, "another")],
)
def test_an_encoder_that_does_not_fit_is_named(projection, width, named):
    sizes = {**KINDS[projection], "feature_dim": width}
    spec = AdapterSpec(projection, tuple(sizes.items()), DIMS)
    with pytest.raises(ValueError) as error:
        check_encoder(spec, prompt(1), "my adapter.bin")
    found = 12 if projection == "base" else 20
    for words in ("'my adapter.bin'", f"{width} wide", named, "a test encoder", f"{found} wide"):
        assert words in str(error.value)


def test_the_encoder_in_the_adapters_metadata_is_named():
    spec = AdapterSpec("base", tuple({**KINDS["base"], "feature_dim": 1024}.items()), DIMS)
    with pytest.raises(ValueError, match="as my_tower gives, but"):
        check_encoder(spec, prompt(1), "adapter", trained_with="my_tower")


@pytest.mark.parametrize(
    "projection, sizes, said",
    [
        ("base", {"embed": 0}, "reads the encoder's image embedding.*'visual_projection.weight'"),
        (
            "plus",
            {"patches": 0, "hidden": 0},
            "reads the encoder's hidden states.*no vision transformer",
        ),
    ],
)
def test_an_encoder_that_does_not_give_what_is_read(projection, sizes, said):
    spec = AdapterSpec(projection, tuple(KINDS[projection].items()), DIMS)
    with pytest.raises(ValueError, match=f"^'my adapter.bin' {said}") as error:
        check_encoder(spec, prompt(1, **sizes), "my adapter.bin")
    assert "a test encoder" in str(error.value) and "that this adapter was" in str(error.value)


# Of published encoders, and of some whose embeddings or hidden states are as wide.
VIT_H = {"embed": 1024, "hidden": 1280, "patches": 257}
VIT_BIGG = {"embed": 1280, "hidden": 1664, "patches": 257}
VIT_H_378 = {**VIT_H, "patches": 730}
VIT_G = {**VIT_H, "hidden": 1408}
RN50 = {"embed": 1024, "hidden": 0, "patches": 0}


@pytest.mark.parametrize(
    "projection, width, made_with, expected",
    [
        ("base", 1024, VIT_H, None),
        ("base", 1280, VIT_BIGG, None),
        ("full", 1280, VIT_H, None),
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
    projection, width, made_with, expected, caplog, request
):
    sizes = {**KINDS[projection], "feature_dim": width}
    spec = AdapterSpec(projection, tuple(sizes.items()), DIMS)
    name = request.node.name
    with caplog.at_level(logging.WARNING, "comfyui_ip_adapter"):
        check_encoder(spec, prompt(1, **made_with), name, trained_with="my_tower")
        assert not caplog.messages
        for _ in range(2):
            check_encoder(spec, prompt(1, **made_with), name)
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
    spec = AdapterSpec("base", tuple({**KINDS["base"], "feature_dim": 1024}.items()), DIMS)
    check_encoder(spec, prompt(1, **VIT_G), f"of {trained_with}", trained_with)
    assert len(caplog.messages) == told


def test_quick_gelu_is_told_of_where_the_published_encoder_has_none(caplog):
    spec = AdapterSpec("base", tuple({**KINDS["base"], "feature_dim": 1024}.items()), DIMS)
    made = prompt(1, **VIT_H)
    for quick in (False, True):
        described = describe_encoder(made.positive, 224, quick)
        check_encoder(spec, replace(made, encoder=described), "quick")
    (said,) = caplog.messages
    assert "the sizes of CLIP ViT-H/14, but quick GELU" in said


def test_an_encoder_that_fits_passes(adapter):
    check_encoder(adapter.spec, prompt(1), "adapter")
