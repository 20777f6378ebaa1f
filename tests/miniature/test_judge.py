"""The judge is right on pictures whose kinds are known, sees changes, and knows no encoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from miniature.scenes import KINDS, outlined, render, scenes


@pytest.fixture(scope="module")
def rows():
    return scenes(1 << 41, 256)


def blurred(pictures):
    return interpolate(avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("as_drawn", [lambda p: p, blurred], ids=["as they are", "blurred"])
def test_it_is_right(judged, rows, as_drawn):
    found = judged.accuracy(as_drawn(render(rows)), rows)
    assert found.keys() == KINDS.keys()
    assert min(found.values()) > 0.95, found


@pytest.mark.parametrize("as_drawn", [lambda p: p, blurred], ids=["as they are", "blurred"])
def test_white_outlines_do_not_mislead_it(judged, rows, as_drawn):
    found = judged.accuracy(as_drawn(outlined(rows)), rows)
    assert min(found.values()) > 0.95, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_one_kind_is_seen_in_that_kind_alone(judged, rows, kind):
    other = replace(rows, **{kind: (getattr(rows, kind) + 1) % KINDS[kind]})
    before, after = judged(render(rows)), judged(render(other))
    for name in KINDS:
        changed = float((before[name] != after[name]).float().mean())
        assert changed > 0.9 if name == kind else changed < 0.1, name


def test_noise_is_no_texture(judged):
    found = judged(torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert float((found["texture"] == 0).float().mean()) > 0.9
