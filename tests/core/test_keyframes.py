"""Weights of latents, typed."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_ip_adapter.ip_adapter_core.keyframes import weights_of


@pytest.mark.parametrize(
    "text, count, expected",
    [
        ("0, 0.5, 1", 0, [0, 0.5, 1]),
        ("-.5\n1e-1;2", 3, [-0.5, 0.1, 2]),
        ("0.7", 1, [0.7]),
        ("1, 2,\n", 0, [1, 2]),
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
        ("1e999", 0, "finite"),
        ("0: 1e999", 0, "finite"),
    ],
)
def test_what_cannot_be_read(text, count, message):
    with pytest.raises(ValueError, match=message):
        weights_of(text, count)
