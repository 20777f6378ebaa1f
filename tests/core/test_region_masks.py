"""What masks may take of the picture where they overlap."""

from __future__ import annotations

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.region_masks import share_out


def masks(count=3, height=6, width=5):
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(1, height, width, generator=generator) for _ in range(count)]


def test_masks_of_other_sizes_and_numbers():
    """A left half in few pixels and a right half in many, one of them for each of two latents."""
    left = torch.zeros(4, 4)
    left[:, :2] = 1
    right = torch.zeros(2, 16, 32)
    right[0, :, 16:] = 1
    first, second, rest = share_out([left, right], "normalize", rest=True)
    assert first.shape == second.shape == rest.shape == (2, 16, 32)
    assert float((first[0] + second[0]).min()) > 0.4  # the edge of the small one is soft
    assert float((first + second).max()) <= 1 + 1e-6
    assert torch.equal(second[:, :, 24:], right[:, :, 24:]) and not second[1].any()
    assert float(rest[1, :, 20:].min()) == 1 and float(rest[1, :, :10].max()) == 0


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="'both'; expected one of normalize, add"):
        share_out(masks(), "both")
    with pytest.raises(ValueError, match="There is no mask"):
        share_out([], "add", rest=True)
    with pytest.raises(ValueError, match="2 masks and another 3"):
        share_out([torch.ones(2, 4, 4), torch.ones(3, 4, 4)], "add")


def test_negative_values_make_no_room_for_others():
    given = [torch.tensor([[[-1.0, 0.5]]]), torch.tensor([[[0.8, 1.0]]])]
    first, second, rest = share_out(given, "normalize", rest=True)
    assert first.tolist() == [[[-1.0, pytest.approx(0.5 / 1.5)]]]
    assert second.tolist() == [[[pytest.approx(0.8), pytest.approx(1 / 1.5)]]]
    assert rest.tolist() == [[[pytest.approx(0.2), 0.0]]]
