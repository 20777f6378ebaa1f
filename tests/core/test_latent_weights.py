"""Weights of latents, typed."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_ip_adapter.ip_adapter_core.latent_weights import weights_of


@pytest.mark.parametrize(
    "text, count, expected",
    [
        ("0, 0.5, 1", 0, [0, 0.5, 1]),
        ("-.5\n1e-1;2", 3, [-0.5, 0.1, 2]),
        ("0.7", 1, [0.7]),
        ("1, 2,\n", 0, [1, 2]),
        ("０．５，１；－２、.5", 0, [0.5, 1, -2, 0.5]),  # as CJK keyboards type it
    ],
)
def test_a_list(text, count, expected):
    assert weights_of(text, count) == expected


@pytest.mark.parametrize(
    "text, count, points",
    [
        ("0: 0, 8: 1", 0, {0: 0, 8: 1}),
        ("0: 0, 8: 1", 20, {0: 0, 8: 1}),
        ("3: 1\n 5=-2; 11: .5", 16, {3: 1, 5: -2, 11: 0.5}),
        ("4: 2", 7, {4: 2}),
        ("0：0，８＝1；10：2、11：3", 0, {0: 0, 8: 1, 10: 2, 11: 3}),
    ],
)
def test_keyframes_are_linear_between_and_constant_outside(text, count, points):
    found = weights_of(text, count)
    assert len(found) == (count or max(points) + 1)
    expected = np.interp(range(len(found)), [*points], [*points.values()])
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, count, message",
    [
        ("", 0, "empty"),
        ("a lot", 0, "'a lot'"),
        ("0: 1, 2", 0, "has '0: 1'"),
        ("0, 1", 3, "lists 2 numbers for 3 latents"),
        ("0: 0, 8: 1", 8, "keyframe at latent 8.*0 … 7"),
        ("1e999", 0, "has inf; expected -5 … 5"),
        ("0: 1e999, 4: 0", 0, "has inf; expected -5 … 5"),
        ("0,25; 0,5", 0, "has 25; expected -5 … 5.*point"),
        ("0: 0, 1: -5.1", 0, "has -5.1; expected -5 … 5"),
        ("0: 0, 1000000000: 1", 0, "latent 1000000000, .* 100000 latents at most"),
        ("3: 1, 0: 0, 3: 2", 0, "two keyframes at latent 3: 1 and 2"),
    ],
)
def test_what_cannot_be_read(text, count, message):
    with pytest.raises(ValueError, match=message):
        weights_of(text, count)


def test_messages_name_the_input_and_its_own_range():
    with pytest.raises(ValueError, match=r"^starts has 2; expected 0 … 1"):
        weights_of("0.5, 2", name="starts", limits=(0, 1))
    with pytest.raises(ValueError, match=r"^starts is empty"):
        weights_of(" ", name="starts")
