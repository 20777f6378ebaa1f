"""Image encoding against transformers, from whose features the published adapters learnt; what
part of a picture the encoder sees, and pictures of any shape within bounds."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

MEGABYTE = 2**20
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 40,
}


@functools.cache
def encoders(activation):
    """ComfyUI's CLIP vision model and transformers' of equal weights, which the host keeps in
    float16; `quick_gelu` as in ViT-L/14, `gelu` as in ViT-H/14."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import clip_vision_model

    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, hidden_act=activation))
    generator = torch.Generator().manual_seed(0)
    for name, weight in theirs.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            noise = 0.1 * noise + name.endswith("weight")
        elif weight.ndim > 1 and "position" not in name:
            noise = noise * 1.5 / weight[0].numel() ** 0.5
        weight.data = noise.half().float()
    ours = clip_vision_model({**SIZES, "hidden_act": activation, "model_type": "clip_vision_model"})
    missing, unexpected = ours.load_sd(theirs.state_dict())
    assert not missing
    assert not [key for key in unexpected if not key.endswith("position_ids")]
    return ours, theirs.eval()


@pytest.fixture(params=["quick_gelu", "gelu"])
def pair(pack, request):
    return encoders(request.param)


@pytest.fixture
def clip(pack):
    return encoders("gelu")[0]


@pytest.fixture(scope="session")
def encode(pack):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.encode import encode

    return lambda clip, image, crop="center", negative=None: encode(clip, image, negative, crop)


def pictures(*shape, seed=0):
    """Soft random colours with 8 bits, so that no preprocessing has to round."""
    n, height, width, channels = shape
    coarse = torch.rand(n, channels, 6, 9, generator=torch.Generator().manual_seed(seed))
    image = interpolate(coarse, (height, width), mode="bilinear")
    return (255 * image.movedim(1, -1)).round() / 255


def truth(theirs, pixel_values):
    """image_embeds and hidden_states[-2] of normalised pixels."""
    out = theirs(pixel_values=pixel_values, output_hidden_states=True)
    return out.image_embeds, out.hidden_states[-2]


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("image_embeds", "penultimate_hidden_states")
    )


@pytest.mark.parametrize("shape", [(224, 224), (300, 300), (260, 390), (500, 280)])
def test_features_are_transformers(encode, pair, shape):
    """Of resized pictures a little less: PIL and torch filter differently, and both round."""
    image = pictures(3, *shape, 3)
    found = encode(pair[0], image).positive
    scripts = [(255 * picture).round().byte().numpy() for picture in image]
    pixels = CLIPImageProcessor()(images=scripts, return_tensors="pt")["pixel_values"]
    embeds, states = truth(pair[1], pixels)
    assert found.penultimate_hidden_states.shape == states.shape == (3, 257, 64)
    most = 1e-3 if shape == (224, 224) else 2e-2
    assert difference(found.image_embeds, embeds) < most
    assert difference(found.penultimate_hidden_states, states) < most


@pytest.mark.parametrize("images", [1, 3])
def test_zero_image_is_that_of_training(encode, pair, images):
    """Base: a zero embedding. Fine-grained: zero pixels after normalisation, not before."""
    negative = encode(pair[0], pictures(images, 224, 224, 3)).negative
    _, states = truth(pair[1], torch.zeros(1, 3, 224, 224))
    assert torch.equal(negative.image_embeds, torch.zeros(1, 40))
    assert difference(negative.penultimate_hidden_states, states) < 1e-3
    black = encode(pair[0], torch.zeros(1, 224, 224, 3)).positive
    assert difference(black.penultimate_hidden_states, states) > 0.1


def test_negative_image_takes_the_zero_images_place(encode, clip):
    image, other = pictures(2, 224, 224, 3), pictures(3, 100, 120, 3, seed=1)
    prompt = encode(clip, image, negative=other)
    assert same(prompt.positive, encode(clip, image).positive)
    assert same(prompt.negative, encode(clip, other).positive)


def test_pictures_of_a_batch_do_not_see_each_other(encode, clip):
    image = pictures(3, 224, 224, 3)
    batch = encode(clip, image).positive
    for n in range(3):
        alone = encode(clip, image[n : n + 1]).positive
        assert difference(batch.image_embeds[n], alone.image_embeds[0]) < 1e-5


@pytest.mark.parametrize("crop, hosts", [("center", True), ("none", False)])
@pytest.mark.parametrize(
    "shape", [(224, 224), (64, 64), (1, 1), (300, 200), (100, 399), (512, 128)]
)
def test_up_to_four_to_one_the_hosts_own_node_gives_the_same_bits(encode, clip, crop, hosts, shape):
    image = pictures(2, *shape, 3)
    found = encode(clip, image, crop).positive
    expected = clip.encode_image(image, crop=hosts)
    assert torch.equal(found.image_embeds, expected["image_embeds"])
    assert torch.equal(found.penultimate_hidden_states, expected["penultimate_hidden_states"])


@pytest.mark.parametrize("crop", ["center", "pad", "none"])
def test_grey_and_transparent_pictures(encode, clip, crop):
    image = pictures(2, 90, 130, 4)
    grey = image[..., :1]
    for given, rgb in ((image, image[..., :3]), (grey, grey.repeat(1, 1, 1, 3))):
        assert same(encode(clip, given, crop).positive, encode(clip, rgb, crop).positive)


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
    given = (image, None) if name == "image" else (pictures(1, 8, 8, 3), image)
    with pytest.raises(ValueError) as error:
        encode(clip, given[0], negative=given[1])
    assert str(error.value).startswith(f"{name} ")
    assert all(words in str(error.value) for words in said)


def test_an_unknown_crop(encode, clip):
    with pytest.raises(ValueError, match="'middle'; expected one of center, pad, none"):
        encode(clip, pictures(1, 8, 8, 3), "middle")


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.bytes = max(self.bytes, *made, 0)
        return out


@pytest.fixture
def states(encode, clip):
    return lambda image, crop: encode(clip, image, crop).positive.penultimate_hidden_states


def noise(height, width):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("crop, edges_count", [("center", False), ("pad", True), ("none", True)])
@pytest.mark.parametrize("wide", [True, False])
def test_what_is_cut_off(states, crop, edges_count, wide):
    image = noise(64, 160) if wide else noise(160, 64)

    def inverted(start, stop):
        changed = image.clone()
        part = changed.narrow(2 if wide else 1, start, stop - start)
        part.copy_(1 - part)
        return states(changed, crop)

    before = states(image, crop)
    assert torch.equal(inverted(0, 44), before) == (not edges_count)
    assert not torch.equal(inverted(52, 60), before)


@pytest.mark.parametrize("height, width", [(60, 100), (101, 60), (1, 9), (900, 2500)])
def test_pad_adds_margins_of_the_mean_colour(clip, states, height, width):
    image, side = noise(height, width), max(height, width)
    square = torch.tensor(clip.image_mean).expand(1, side, side, 3).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    assert difference(states(image, "pad"), states(square, "none")) < 1e-2
    assert difference(states(image, "center"), states(square, "none")) > 5e-2


@pytest.mark.parametrize("crop", ["center", "pad", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (16384, 1), (3, 2000), (2000, 7)])
def test_extreme_shapes_stay_small(states, crop, shape):
    with LargestTensor() as largest:
        found = states(noise(*shape), crop)
    assert found.isfinite().all()
    assert largest.bytes < (64 if crop == "pad" else 16) * MEGABYTE


@pytest.mark.parametrize(
    "height, width", [(8, 100), (100, 8), (37, 999), (300, 2000), (1, 30), (50, 251)]
)
def test_long_strips_are_what_the_centre_crop_of_all_of_them_shows(clip, states, height, width):
    """They are shortened before the host enlarges them; the centre is as if they were not."""
    coarse = noise(min(height, 6), min(width, 40)).movedim(-1, 1)
    image = interpolate(coarse, (height, width), mode="bilinear").movedim(1, -1)
    whole = clip.encode_image(image, crop=True)["penultimate_hidden_states"]
    assert difference(states(image, "center"), whole) < 2e-2
