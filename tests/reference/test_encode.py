"""Image encoding against transformers, from whose features the published adapters learnt."""

from __future__ import annotations

import pytest
import torch


def pictures(*shape, seed=0):
    """Soft random colours with 8 bits, so that no preprocessing has to round."""
    n, height, width, channels = shape
    coarse = torch.rand(n, channels, 6, 9, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (255 * image.movedim(1, -1)).round() / 255


def close(found, expected, relative=1e-3):
    return float((found - expected).abs().max() / expected.abs().max()) < relative


@pytest.fixture(scope="session")
def encode(encoders):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.encode import encode

    return encode


@pytest.fixture(params=["quick_gelu", "gelu"])
def pair(encoders, request):
    return encoders.pair(request.param)


@pytest.fixture
def clip(encoders):
    return encoders.pair("gelu")[0]


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("image_embeds", "penultimate_hidden_states")
    )


def test_features_are_transformers(encoders, encode, pair):
    image = pictures(3, 224, 224, 3)
    found = encode(pair[0], image, None, "center").positive
    embeds, states = encoders.truth(pair[1], encoders.preprocessed(image))
    assert found.penultimate_hidden_states.shape == states.shape == (3, 257, 64)
    assert close(found.image_embeds, embeds)
    assert close(found.penultimate_hidden_states, states)


@pytest.mark.parametrize("shape", [(300, 300), (260, 390), (500, 280)])
def test_features_of_resized_pictures(encoders, encode, pair, shape):
    """PIL and torch filter a little differently, and both round to 8 bits."""
    image = pictures(1, *shape, 3)
    found = encode(pair[0], image, None, "center").positive
    embeds, states = encoders.truth(pair[1], encoders.preprocessed(image))
    assert close(found.image_embeds, embeds, 2e-2)
    assert close(found.penultimate_hidden_states, states, 2e-2)


@pytest.mark.parametrize("images", [1, 3])
def test_zero_image_is_that_of_training(encoders, encode, pair, images):
    """Base: a zero embedding. Fine-grained: zero pixels after normalisation, not before."""
    negative = encode(pair[0], pictures(images, 224, 224, 3), None, "center").negative
    _, states = encoders.truth(pair[1], torch.zeros(1, 3, 224, 224))
    assert torch.equal(negative.image_embeds, torch.zeros(1, 40))
    assert close(negative.penultimate_hidden_states, states)
    black = encode(pair[0], torch.zeros(1, 224, 224, 3), None, "center").positive
    assert not close(black.penultimate_hidden_states, states, 0.1)


def test_negative_image_takes_the_zero_images_place(encode, clip):
    image, other = pictures(2, 224, 224, 3), pictures(3, 100, 120, 3, seed=1)
    prompt = encode(clip, image, other, "center")
    assert same(prompt.positive, encode(clip, image, None, "center").positive)
    assert same(prompt.negative, encode(clip, other, None, "center").positive)


def test_pictures_of_a_batch_do_not_see_each_other(encode, clip):
    image = pictures(3, 224, 224, 3)
    batch = encode(clip, image, None, "center").positive
    for n in range(3):
        alone = encode(clip, image[n : n + 1], None, "center").positive
        assert close(batch.image_embeds[n], alone.image_embeds[0], 1e-5)


@pytest.mark.parametrize("crop, hosts", [("center", True), ("none", False)])
@pytest.mark.parametrize(
    "shape", [(224, 224), (64, 64), (1, 1), (300, 200), (100, 399), (512, 128)]
)
def test_up_to_four_to_one_the_hosts_own_node_gives_the_same_bits(encode, clip, crop, hosts, shape):
    image = pictures(2, *shape, 3)
    found = encode(clip, image, None, crop).positive
    expected = clip.encode_image(image, crop=hosts)
    assert torch.equal(found.image_embeds, expected["image_embeds"])
    assert torch.equal(found.penultimate_hidden_states, expected["penultimate_hidden_states"])


@pytest.mark.parametrize("crop", ["center", "pad", "none"])
def test_grey_and_transparent_pictures(encode, clip, crop):
    image = pictures(2, 90, 130, 4)
    assert same(
        encode(clip, image, None, crop).positive, encode(clip, image[..., :3], None, crop).positive
    )
    grey = image[..., :1]
    assert same(
        encode(clip, grey, None, crop).positive,
        encode(clip, grey.repeat(1, 1, 1, 3), None, crop).positive,
    )


@pytest.mark.parametrize(
    "image, said",
    [
        (torch.rand(0, 8, 8, 3), ["holds no pixels", "[0, 8, 8, 3]"]),
        (torch.rand(1, 0, 8, 3), ["holds no pixels", "[1, 0, 8, 3]"]),
        (torch.rand(8, 8, 3), ["[8, 8, 3]", "expected [images, height, width, channels]"]),
        (torch.rand(1, 3, 8, 8), ["[1, 3, 8, 8]", "1 (grey), 3 (RGB) or 4 (RGBA)"]),
        (torch.full((1, 8, 8, 3), torch.nan), ["NaN or infinite pixels"]),
        (torch.full((1, 8, 8, 3), -torch.inf), ["NaN or infinite pixels"]),
    ],
)
@pytest.mark.parametrize("name", ["image", "negative_image"])
def test_pictures_that_cannot_be(encode, clip, image, said, name):
    given = {"image": pictures(1, 8, 8, 3), "negative_image": None, name: image}
    with pytest.raises(ValueError) as error:
        encode(clip, *given.values(), "center")
    assert str(error.value).startswith(f"{name} ")
    assert all(words in str(error.value) for words in said)


def test_an_unknown_crop(encode, clip):
    with pytest.raises(ValueError, match="'middle'; expected one of center, pad, none"):
        encode(clip, pictures(1, 8, 8, 3), None, "middle")
