"""From features to packed K'/V': combining images, λ, packing."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter
from comfyui_ip_adapter.ip_adapter_core.attention import image_attention
from comfyui_ip_adapter.ip_adapter_core.image_prompt import ImageFeatures, ImagePrompt
from comfyui_ip_adapter.ip_adapter_core.packing import (
    SCALINGS,
    LayerFolding,
    compile_sides,
    fold,
    layer_folding,
    tokens,
    unpack,
)

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
    packed = fold(truth, [weight, 2 * weight, 0.0]).tensor
    assert packed.shape == (2, given.shape[1], 2 * sum(DIMS))
    found = unpack(packed, DIMS)
    for (key, value), (k, v), factor in zip(found, truth, [1, 2, 0], strict=True):
        assert torch.equal(key, k)
        torch.testing.assert_close(value, weight * factor * v)
        assert key.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_fold_wants_a_weight_for_every_layer(adapter):
    keys_values = list(adapter.keys_values(read(adapter, prompt(1).positive)))
    with pytest.raises(ValueError, match="zip"):
        fold(keys_values, [1.0, 1.0])


@pytest.mark.parametrize("layers, expected", [(None, [0.5] * 3), ([0, 1, -2.0], [0, 0.5, -1])])
def test_layer_weights(adapter, layers, expected):
    found = layer_folding(adapter.spec, 0.5, layers)
    assert [*found.positive] == [*found.negative] == expected and not any(found.itself)


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
        layer_folding(adapter.spec, weight, layers)


def test_the_folding_of_some_layers_alone():
    given = LayerFolding((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (False, True, False), "K+V")
    assert given.only([1, 2]) == LayerFolding((2.0, 3.0), (5.0, 6.0), (True, False), "K+V")


def _written_out(key, value, weight, scaling, per_image):
    """K' and V' of one layer as ComfyUI_IPAdapter_plus scales them, each image by itself."""
    penalised = weight * key.shape[-1] / 1280
    if scaling == "V only":
        return key, value * weight
    if scaling == "K+V":
        return key * weight, value * weight
    if scaling == "K+V w/ C penalty":
        return key * penalised, value * penalised
    parts = value.split(per_image, dim=1)
    means = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in parts], dim=1)
    return key * penalised, (value - means) + means * penalised


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("images", [1, 3])
def test_what_the_weight_multiplies(adapter, scaling, images):
    given = prompt(images)
    weights = (0.7, -0.4, 1.3)
    folding = LayerFolding.alike(weights, scaling)
    packed, _ = compile_sides(adapter, given, "concat", folding)
    features = getattr(given.positive, adapter.spec.features)
    each = [list(adapter.keys_values(adapter.tokens(f[None]))) for f in features]
    found = unpack(packed.tensor, DIMS)
    count = each[0][0][0].shape[1]
    for number, ((key, value), weight) in enumerate(zip(found, weights, strict=True)):
        keys, values = (torch.cat([one[number][i] for one in each], dim=1) for i in (0, 1))
        wanted = _written_out(keys, values, weight, scaling, count)
        torch.testing.assert_close(key, wanted[0])
        torch.testing.assert_close(value, wanted[1])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_factor_of_the_weight_is_another_weight(adapter, scaling):
    """Curves, weights of latents and arithmetic on conditionings all go this way."""
    given = prompt(2)
    once = compile_sides(adapter, given, "concat", LayerFolding.alike((0.5, 1.0, -2.0), scaling))
    more = compile_sides(adapter, given, "concat", LayerFolding.alike((0.3, 0.6, -1.2), scaling))
    for one, other in zip(once, more, strict=True):
        torch.testing.assert_close(one.scaled(0.6, DIMS).tensor, other.tensor)
        rows = one.scaled(torch.tensor([0.6, 0.0])[:, None, None], DIMS)
        torch.testing.assert_close(rows.tensor[:1], other.tensor)


@pytest.mark.parametrize("combine", ["concat", "per_latent"])
@pytest.mark.parametrize("negatives", [1, 3])
def test_the_negative_side_shows_the_image_itself(adapter, combine, negatives):
    given = prompt(3, negatives)
    folding = LayerFolding((1.0, 0.0, 0.5), (1.0, 0.7, 0.5), (False, True, False))
    positive, negative = compile_sides(adapter, given, combine, folding)
    shown = LayerFolding.alike((1.0, 0.7, 0.5))
    image, against = compile_sides(adapter, given, combine, shown)
    for number, (found, kept, itself) in enumerate(
        zip(*(unpack(x.tensor, DIMS) for x in (negative, against, image)), strict=True)
    ):
        for x, one, other in zip(found, kept, itself, strict=True):
            wanted = other if number == 1 else one
            torch.testing.assert_close(x, wanted.expand(len(x), -1, -1)[:, : x.shape[1]])
    assert not unpack(positive.tensor, DIMS)[1][1].any()


def test_an_unknown_scaling(adapter):
    with pytest.raises(ValueError, match="scaling is 'W only'; expected one of V only, K"):
        fold([], [], "W only")
