"""The set: counted draws, captions that keep silent, and images that show what they say."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from miniature.scenes import (
    COLORS,
    KINDS,
    SAME_SHAPE,
    SHAPES,
    TEXTURES,
    mark,
    outlines,
    references,
    render,
    scenes,
)


def same(one, other):
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def test_any_stretch_of_a_stream_is_the_same():
    whole = scenes(5, 300)
    assert same(whole[100:130], scenes(5, 30, 100))
    assert not same(whole[:30], scenes(6, 30))
    assert torch.equal(render(whole[7:9]), render(scenes(5, 2, 7)))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_equally_frequent_and_independent(kind):
    rows = scenes(1, 6000)
    counts = torch.bincount(getattr(rows, kind), minlength=KINDS[kind])
    expected = 6000 / KINDS[kind]
    assert ((counts - expected).abs() < 5 * expected**0.5).all()
    for other in KINDS.keys() - {kind}:
        table = torch.zeros(KINDS[kind], KINDS[other])
        table.index_put_((getattr(rows, kind), getattr(rows, other)), torch.ones(6000), True)
        cell = 6000 / table.numel()
        assert ((table - cell).abs() < 5 * cell**0.5).all()


def test_captions_name_the_shape_and_nothing_else():
    rows = scenes(2, 200)
    others = {*COLORS, *TEXTURES} - {"plain"}
    for text, shape in zip(rows.captions, rows.shape, strict=True):
        assert text == f"a {SHAPES[shape]}"
        assert not others & {*text.split()}
    assert len({*scenes(2, 2000).descriptions}) > 500


def test_references_are_the_images_but_for_some_of_the_shapes():
    targets = scenes(3, 2000)
    others = references(targets, 99)
    for kept in {*vars(targets)} - {"shape"}:
        assert torch.equal(getattr(others, kept), getattr(targets, kept))
    alike = float((others.shape == targets.shape).float().mean())
    assert abs(alike - (SAME_SHAPE + (1 - SAME_SHAPE) / 6)) < 0.03
    assert same(references(targets[500:600], 99, 500), others[500:600])


@pytest.mark.parametrize("side", [64, 128, 200])
def test_images_of_any_size_show_the_same(side):
    rows = scenes(4, 12)
    small, large = render(rows, 64), render(rows, side)
    assert large.shape == (12, 3, side, side)
    assert large.min() >= 0 and large.max() <= 1
    again = torch.nn.functional.interpolate(large, 64, mode="area")
    assert float((again - small).abs().mean()) < 0.02


def test_a_shape_covers_what_its_formula_says():
    rows = scenes(8, 600)
    covered = outlines(rows, 256).mean((1, 2))
    for shape, area in ((0, torch.pi * 0.72**2), (1, (2 * 0.62) ** 2)):
        chosen = (rows.shape == shape) & (rows.size < 0.85)  # not cut by the image's edge
        expected = area * rows.size[chosen] ** 2 / 4
        assert float((covered[chosen] - expected).abs().max()) < 0.01


def test_the_mark_is_of_the_rule(monkeypatch):
    before = mark()
    assert before == mark() and len(before) == 16
    monkeypatch.setattr("miniature.scenes.DARK", 0.5)
    assert mark() != before
