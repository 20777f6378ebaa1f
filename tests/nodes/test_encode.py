"""IPA_PrepareImage: what the encoder sees, from which the same features come. IPA_EncodeImage and
IPA_CombinePrompts: which encoder a prompt is of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor

KINDS = ("image_embeds", "penultimate_hidden_states")
SIZE = 28  # of the encoder
SHAPES = [(28, 28), (1, 9), (7, 400), (300, 200)]


def pictures(height, width, count=2, channels=3):
    generator = torch.Generator().manual_seed(height + width)
    return torch.rand(count, height, width, channels, generator=generator)


@pytest.fixture
def prepare(nodes, clip_vision, prompts_folder):
    execute = nodes["IPA_PrepareImage"].execute

    def prepare(image, crop="center", x=0.5, y=0.5, grid=1):
        return execute(clip_vision, image, crop, x, y, grid).args[0]

    return prepare


@pytest.fixture
def encode(nodes, clip_vision):
    def encode(image, crop="center", encoder=clip_vision):
        return nodes["IPA_EncodeImage"].execute(encoder, image, crop).args[0]

    return encode


def same(one, other):
    return all(
        torch.equal(getattr(one.positive, kind), getattr(other.positive, kind)) for kind in KINDS
    )


@pytest.mark.parametrize("crop", ["center", "pad", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_the_features_of_the_original_to_the_bit(prepare, encode, shape, crop):
    image = pictures(*shape)
    expected, made = encode(image, crop), prepare(image, crop)
    assert made.shape == (2, SIZE, SIZE, 3)
    for again in ("center", "pad", "none"):
        assert same(encode(made, again), expected)
    if shape[0] != shape[1]:
        other = encode(image, "none" if crop == "center" else "center")
        assert not same(expected, other)


@pytest.mark.parametrize("crop", ["center", "pad", "none", "point", "tiles"])
def test_it_is_of_8_bits_and_prepared_again_the_same(prepare, crop):
    made = prepare(pictures(50, 90), crop)
    assert (made.dtype, made.min() >= 0, made.max() <= 1) == (torch.float32, True, True)
    assert torch.equal(made, (255 * made).round() / 255)
    for again in ("center", "pad", "none", "point", "tiles"):
        assert torch.equal(prepare(made, again), made)


@pytest.mark.parametrize("shape", [(28, 28), (60, 60), (57, 80), (96, 64)])
def test_centre_is_transformers(prepare, clip_vision, shape):
    """PIL's filter and torch's differ a little, and both round."""
    coarse = pictures(6, 8).movedim(-1, 1)
    image = torch.nn.functional.interpolate(coarse, shape, mode="bilinear").movedim(1, -1)
    given = [(255 * picture).round().byte().numpy() for picture in image]
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    truth = processor(images=given, return_tensors="pt", do_normalize=False)["pixel_values"]
    difference = (prepare(image) - truth.movedim(1, -1)).abs()
    assert difference.max() < (0.5 / 255 if shape == (28, 28) else 3 / 255)


@pytest.mark.parametrize("height, width", [(40, 100), (100, 40)])
@pytest.mark.parametrize("at, start", [(0.0, 0), (0.3, 10), (0.35, 15), (0.5, 30), (1.0, 60)])
def test_point_is_the_square_around_it(prepare, encode, height, width, at, start):
    image = pictures(height, width)
    x, y = (at, 0.9) if width > height else (0.1, at)
    dim = 2 if width > height else 1
    made = prepare(image, "point", x, y)
    assert same(encode(made, "center"), encode(image.narrow(dim, start, 40), "center"))


def test_tiles_are_one_image_each(prepare, encode):
    image = pictures(40, 100)
    made = prepare(image, "tiles")
    assert len(made) == 6
    cut = [image[n : n + 1, :, left : left + 40] for n in range(2) for left in (0, 30, 60)]
    assert torch.equal(made, torch.cat([prepare(square) for square in cut]))
    assert same(encode(made, "pad"), encode(torch.cat(cut), "center"))
    assert len(prepare(pictures(64, 60), "tiles", grid=3)) == 18


def test_grey_and_transparent_pictures(prepare):
    image = pictures(40, 50, channels=4)
    for crop in ("center", "point", "tiles"):
        assert torch.equal(prepare(image, crop), prepare(image[..., :3], crop))
        grey = image[..., :1]
        assert torch.equal(prepare(grey, crop), prepare(grey.repeat(1, 1, 1, 3), crop))


def test_the_node_shows_it(nodes, clip_vision, prompts_folder):
    from PIL import Image

    image = pictures(40, 100)
    made = nodes["IPA_PrepareImage"].execute(clip_vision, image, "tiles", 0.5, 0.5, 1)
    shown = made.ui.as_dict()["images"]
    assert len(shown) == len(made.args[0]) == 6
    for entry, expected in zip(shown, made.args[0], strict=True):
        path = prompts_folder.parents[1] / entry["type"] / entry["subfolder"] / entry["filename"]
        pixels = np.asarray(Image.open(path), float)
        # The host cuts the fraction off where others round.
        assert np.abs(pixels - 255 * expected.numpy()).max() <= 1.001


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"crop": "middle"}, "'middle'; expected one of center, pad, none, point, tiles"),
        ({"image": torch.rand(0, 8, 8, 3)}, "image holds no pixels"),
        ({"image": torch.rand(8, 8, 3), "crop": "point"}, r"image has shape \[8, 8, 3\]"),
        ({"image": torch.full((1, 8, 8, 3), torch.nan), "crop": "tiles"}, "image contains NaN"),
    ],
)
def test_what_cannot_be(prepare, changed, said):
    with pytest.raises(ValueError, match=said):
        prepare(**{"image": pictures(40, 50), **changed})


@pytest.fixture
def combine(nodes):
    execute = nodes["IPA_CombinePrompts"].execute
    return lambda prompts, method="concat", weights="": execute(prompts, method, weights).args[0]


@pytest.fixture
def another(clip_vision, small):
    """An image encoder of the same shapes, with other weights."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import clip_vision_model

    made = clip_vision_model(clip_vision.config)
    small.fill(made.model.requires_grad_(False), seed=41)
    return made


SQUARE = torch.rand(1, 28, 28, 3, generator=torch.Generator().manual_seed(0))


def test_weights_follow_the_sockets(small, combine):
    """A workflow for the server may name sockets in any order, and leave some out."""
    prompts = {f"prompt{i}": small.images(seed=i) for i in (11, 2, 0)}
    made = combine(prompts, "add", "1, 10, 100")
    one, two, three = (prompts[f"prompt{i}"].positive.image_embeds for i in (0, 2, 11))
    torch.testing.assert_close(made.positive.image_embeds, one + 10 * two + 100 * three)


def test_the_activation_goes_into_the_description(encode, clip_vision, monkeypatch):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import encode as module

    monkeypatch.setattr(module, "describe_encoder", lambda *given: f"quick: {given[-1]}")
    assert encode(SQUARE).encoder == "quick: False"
    monkeypatch.setitem(clip_vision.config, "hidden_act", "quick_gelu")
    assert encode(SQUARE).encoder == "quick: True"


def test_encoders_of_equal_shapes_are_told_apart(encode, combine, clip_vision, another):
    one, other = (encode(SQUARE, encoder=encoder) for encoder in (clip_vision, another))
    assert one.encoder == other.encoder
    assert one.fingerprint != other.fingerprint
    with pytest.raises(ValueError) as error:
        combine({"prompt0": one, "prompt1": other}, "average")
    for words in (one.encoder, one.fingerprint[:12], other.fingerprint[:12], "prompt0", "prompt1"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_act": "quick_gelu"},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.5]},
    ],
)
def test_other_settings_of_the_same_weights_are_another_encoder(encode, clip_vision, changed):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import clip_vision_model

    made = clip_vision_model({**clip_vision.config, **changed})
    made.model.load_state_dict(clip_vision.get_sd())
    one, other = (encode(SQUARE, encoder=encoder) for encoder in (clip_vision, made))
    assert one.encoder == other.encoder
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "damaged",
    ["visual_projection.weight", "vision_model.embeddings.position_embedding.weight"],
)
def test_a_damaged_encoder_is_named(encode, another, value, damaged):
    known = encode(SQUARE, encoder=another).encoder
    another.model.get_parameter(damaged).data.view(-1)[7] = value
    with pytest.raises(ValueError, match=r"NaN or infinite.*weights are damaged") as error:
        encode(SQUARE, encoder=another)
    assert known in str(error.value)
