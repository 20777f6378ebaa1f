"""A map of shares as colours, and the pictures that it may lie over."""

from __future__ import annotations

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core import attention_map


def test_colours_reach_from_nothing_to_the_largest_value_of_all_maps():
    maps = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    colours = attention_map.colorize(maps)
    assert torch.allclose(attention_map.colorize(maps * 1e-3), colours, atol=1e-5)
    grey = colours.mean(-1).flatten()[maps.flatten().argsort()]
    assert (grey.diff() >= 0).all() and float(grey[-1]) > 0.8


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (24, 36)])
def test_pictures_of_the_maps_shape_at_any_size(size):
    attention_map.check_images(torch.rand(2, *size, 3), torch.rand(2, 8, 12))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 64, 96, 3), "image holds 3 pictures, but samples 2 latents"),
        ((1, 64, 96, 3), "image holds 1 pictures, but samples 2 latents"),
        ((2, 64, 64, 3), "image is 64×64 pixels, but samples 12×8 latents"),
        ((2, 96, 64, 3), "image is 64×96 pixels"),
    ],
)
def test_pictures_of_another_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        attention_map.check_images(torch.rand(shape), torch.rand(2, 8, 12))
