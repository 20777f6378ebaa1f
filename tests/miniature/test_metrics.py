"""What images show, overlap and the other measures, on images for which they are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from miniature.metrics import (
    centers,
    chance,
    displacement,
    distance,
    interval,
    overlap,
    seen,
    shade_error,
    share,
    whiteness_of_outlines,
)
from miniature.scenes import KINDS, outlined, outlines, render, scenes

ROWS = scenes(1 << 41, 64)
MANY = scenes(1 << 41, 256)


def blurred(images):
    return interpolate(avg_pool2d(images, 2), scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("draw", [render, outlined], ids=["plain", "outlined"])
@pytest.mark.parametrize("change", [lambda x: x, blurred], ids=["as they are", "blurred"])
def test_the_classifier_is_right(classify, draw, change):
    found = classify.accuracy(change(draw(MANY)), MANY)
    assert found.keys() == KINDS.keys()
    assert min(found.values()) > 0.95, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_one_kind_is_seen_in_that_kind_alone(classify, kind):
    other = replace(MANY, **{kind: (getattr(MANY, kind) + 1) % KINDS[kind]})
    before, after = classify(render(MANY)), classify(render(other))
    for name in KINDS:
        changed = float((before[name] != after[name]).float().mean())
        assert changed > 0.9 if name == kind else changed < 0.1, name


def test_noise_is_no_texture(classify):
    found = classify(torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert float((found["texture"] == 0).float().mean()) > 0.9


def test_shapes_where_they_are_asked_for_overlap_and_shifted_ones_less():
    asked = outlines(ROWS, 64)
    assert overlap(render(ROWS), asked) > 0.9
    assert 0.2 < overlap(render(replace(ROWS, x=ROWS.x + 0.3)), asked) < 0.75
    assert overlap(render(ROWS), 1 - asked) < 0.1


def test_outlines_of_the_second_style_are_white():
    dark = ROWS[torch.isin(ROWS.background, torch.tensor([1, 4]))]  # where an outline is seen
    assert whiteness_of_outlines(outlined(dark)) > 0.6
    assert whiteness_of_outlines(render(dark)) < 0.3


def test_chance_knows_what_is_preferred():
    """Half of the images show kind 0, as do three in four of the references."""
    found = torch.tensor([0, 0, 1, 2] * 16)
    wanted = torch.tensor([0, 0, 0, 3] * 16)
    seen = chance(found, wanted)
    assert seen["mean"] == pytest.approx(0.5 * 0.75, abs=0.01)
    generator = torch.Generator().manual_seed(5)
    shuffled = [share(found, wanted[torch.randperm(64, generator=generator)]) for _ in range(2000)]
    assert 0.98 < sum(seen["low"] <= one <= seen["high"] for one in shuffled) / 2000 < 1
    assert share(found, found) > seen["high"]  # images that follow are beyond it


def test_chance_of_several_images_of_each_reference():
    """They are shuffled together: four copies of a image are no more certain than one."""
    generator = torch.Generator().manual_seed(1)
    found, wanted = (torch.randint(4, (64,), generator=generator) for _ in range(2))
    once, copies = chance(found, wanted), chance(found[:, None].expand(-1, 4), wanted)
    assert copies == once == chance(found[:, None], wanted)
    four = torch.randint(4, (64, 4), generator=generator)
    many = chance(four, wanted)
    assert many["high"] - many["low"] < 0.7 * (once["high"] - once["low"])
    assert many["low"] < share(four, wanted[:, None]) < many["high"]


def test_the_interval_is_wilsons():
    """Of 45 in 50: the formula, by hand."""
    found, wanted = torch.ones(50), torch.tensor([1.0] * 45 + [0.0] * 5)
    z, n, p = 1.959964, 50, 0.9
    middle, half = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    expected = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert interval(found, wanted) == pytest.approx(expected, abs=1e-6)


def test_displacement_is_in_pixels():
    """x and y are in halves of the image, 32 pixels."""
    rows = replace(ROWS, x=ROWS.x / 4, y=ROWS.y / 4, size=ROWS.size * 0.8)  # wholly seen
    moved = replace(rows, x=rows.x + 0.2, y=rows.y - 0.15)
    shifted = centers(render(moved)) - centers(render(rows))
    torch.testing.assert_close(shifted.mean(0), torch.tensor([6.4, -4.8]), atol=0.4, rtol=0)
    assert displacement(render(moved), render(rows)) == pytest.approx(8, abs=0.4)
    assert displacement(render(ROWS), render(ROWS)) == 0
    empty = render(replace(ROWS, x=ROWS.x + 5)[:1])  # out of the image
    assert bool(centers(empty).isnan().all())
    shown = render(ROWS[:1])
    assert displacement(torch.cat([shown, empty]), torch.cat([shown, empty])) == 0


def test_images_without_a_shape_are_counted():
    empty = render(replace(ROWS[:16], x=ROWS.x[:16] + 5))
    assert seen(render(ROWS)) == 1 and seen(empty) == 0
    assert seen(torch.cat([render(ROWS[:16]), empty])) == 0.5


def test_distance_is_in_8_bit_levels():
    assert distance(torch.full((2, 3, 4, 4), 0.25), torch.full((2, 3, 4, 4), 0.5)) == 63.75


def test_the_error_of_a_shade_is_of_the_shape_alone():
    """Wherever it lies, before whatever it stands: a light that is a tenth less is told."""
    rows = replace(ROWS, texture=torch.zeros_like(ROWS.texture), light=ROWS.light * 0 + 1)
    moved = replace(rows, x=-rows.x, background=(rows.background + 1) % 5)
    darker = replace(rows, light=rows.light * 0.9)
    shades = (render(rows) * outlines(rows, 64)[:, None]).sum((2, 3))
    shades = shades / outlines(rows, 64).sum((1, 2))[:, None]
    assert shade_error(render(moved), render(rows)) < 6
    assert shade_error(render(darker), render(rows)) == pytest.approx(
        float(shades.mean() * 25.5), rel=0.15
    )
    assert shade_error(render(rows), render(rows)) == 0
