"""What part of a picture the encoder sees, and pictures of any shape within bounds."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEGABYTE = 2**20


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.bytes = max(self.bytes, *made, 0)
        return out


@pytest.fixture
def clip(encoders):
    return encoders.pair("gelu")[0]


@pytest.fixture
def embed(clip):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.encode import encode

    return lambda image, crop: encode(clip, image, None, crop).positive.penultimate_hidden_states


def noise(height, width):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(height))


def changed(image, rows=slice(None), columns=slice(None)):
    image = image.clone()
    image[:, rows, columns] = 1 - image[:, rows, columns]
    return image


def difference(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("crop, edges_count", [("center", False), ("pad", True), ("none", True)])
@pytest.mark.parametrize("wide", [True, False])
def test_what_is_cut_off(embed, crop, edges_count, wide):
    image = noise(64, 160) if wide else noise(160, 64)
    edge, middle = ({"columns" if wide else "rows": slice(*ends)} for ends in ((0, 44), (52, 60)))
    before = embed(image, crop)
    assert torch.equal(embed(changed(image, **edge), crop), before) == (not edges_count)
    assert not torch.equal(embed(changed(image, **middle), crop), before)


@pytest.mark.parametrize("height, width", [(60, 100), (101, 60), (1, 9), (900, 2500)])
def test_pad_adds_margins_of_the_mean_colour(clip, embed, height, width):
    image, side = noise(height, width), max(height, width)
    square = torch.tensor(clip.image_mean).expand(1, side, side, 3).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    assert difference(embed(image, "pad"), embed(square, "none")) < 1e-2
    assert difference(embed(image, "center"), embed(square, "none")) > 5e-2


@pytest.mark.parametrize("crop", ["center", "pad", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (16384, 1), (3, 2000), (2000, 7)])
def test_extreme_shapes_stay_small(embed, crop, shape):
    with LargestTensor() as largest:
        states = embed(noise(*shape), crop)
    assert states.isfinite().all()
    assert largest.bytes < (64 if crop == "pad" else 16) * MEGABYTE


@pytest.mark.parametrize(
    "height, width", [(8, 100), (100, 8), (37, 999), (300, 2000), (1, 30), (50, 251)]
)
def test_long_strips_are_what_the_centre_crop_of_all_of_them_shows(clip, embed, height, width):
    """They are shortened before the host enlarges them; the centre is as if they were not."""
    coarse = noise(min(height, 6), min(width, 40)).movedim(-1, 1)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    image = image.movedim(1, -1)
    whole = clip.encode_image(image, crop=True)["penultimate_hidden_states"]
    assert difference(embed(image, "center"), whole) < 2e-2
