"""Overlap, whiteness and the findings' figures, on pictures for which they are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from miniature import findings, pairs, toolbox
from miniature.drawing import Task
from miniature.metrics import (
    Similarity,
    centres,
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
from miniature.scenes import outlined, outlines, render, scenes
from miniature.workflows import SECOND

ROWS = scenes(1 << 41, 64)


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
    """Half of the pictures show kind 0, as do three in four of the references."""
    found = torch.tensor([0, 0, 1, 2] * 16)
    wanted = torch.tensor([0, 0, 0, 3] * 16)
    seen = chance(found, wanted)
    assert seen.mean == pytest.approx(0.5 * 0.75, abs=0.01)
    generator = torch.Generator().manual_seed(5)
    shuffled = [share(found, wanted[torch.randperm(64, generator=generator)]) for _ in range(2000)]
    assert 0.98 < sum(seen.low <= one <= seen.high for one in shuffled) / 2000 < 1
    assert share(found, found) > seen.high  # pictures that follow are beyond it


def test_chance_of_several_pictures_of_each_reference():
    """They are shuffled together: four copies of a picture are no more certain than one."""
    generator = torch.Generator().manual_seed(1)
    found, wanted = (torch.randint(4, (64,), generator=generator) for _ in range(2))
    once, copies = chance(found, wanted), chance(found[:, None].expand(-1, 4), wanted)
    assert copies == once == chance(found[:, None], wanted)
    four = torch.randint(4, (64, 4), generator=generator)
    many = chance(four, wanted)
    assert many.high - many.low < 0.7 * (once.high - once.low)
    assert many.low < share(four, wanted[:, None]) < many.high


def test_the_interval_is_wilsons():
    """Of 45 in 50: the formula, by hand."""
    found, wanted = torch.ones(50), torch.tensor([1.0] * 45 + [0.0] * 5)
    z, n, p = 1.959964, 50, 0.9
    middle, half = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    expected = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert interval(found, wanted) == pytest.approx(expected, abs=1e-6)


def test_displacement_is_in_pixels():
    """x and y are in halves of the picture, 32 pixels."""
    rows = replace(ROWS, x=ROWS.x / 4, y=ROWS.y / 4, size=ROWS.size * 0.8)  # wholly seen
    moved = replace(rows, x=rows.x + 0.2, y=rows.y - 0.15)
    shifted = centres(render(moved)) - centres(render(rows))
    torch.testing.assert_close(shifted.mean(0), torch.tensor([6.4, -4.8]), atol=0.4, rtol=0)
    assert displacement(render(moved), render(rows)) == pytest.approx(8, abs=0.4)
    assert displacement(render(ROWS), render(ROWS)) == 0
    empty = render(replace(ROWS, x=ROWS.x + 5)[:1])  # out of the picture
    assert bool(centres(empty).isnan().all())
    shown = render(ROWS[:1])
    assert displacement(torch.cat([shown, empty]), torch.cat([shown, empty])) == 0


def test_pictures_without_a_shape_are_counted():
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


@pytest.fixture
def task():
    return Task.of(24, seed=3)


def test_partners_share_neither_colour_nor_background(task):
    second = pairs.partners(task.rows)
    groups = [[number, other] for number, other in enumerate(second.tolist())]
    third = pairs.unlike(task.rows, groups)
    for kind in ("colour", "background"):
        values = getattr(task.rows, kind)
        assert (values != values[second]).all()
        assert (values != values[third]).all() and (values[second] != values[third]).all()
    assert len(set(third.tolist())) > 8
    with pytest.raises(ValueError, match="None of 1 scenes"):
        pairs.partners(task.rows[:1])


LAYERS = {
    "1": {"class_type": "IPA_LayerWeights", "inputs": {}},
    "2": {"class_type": "IPA_AttentionMap", "inputs": {}},
    "3": {"class_type": "SaveImage", "inputs": {}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {}},
}


class Told:
    """Stands in for a Drawer: gives pictures that are known, by workflow."""

    def __init__(self, task, pictures):
        self.task, self.pictures = task, pictures
        self.names = [f"{number}.png" for number in task.seeds]

    def lay(self, stem, rows):
        return [f"{stem}.png"] * len(rows)

    def __call__(self, workflow, weight=1.0, adapter=None, texts=None, change=None, **_):
        """Of the workflow with that preset, checkpoint, adapter or weight, if one is known."""
        self.texts = texts
        named = [(workflow, adapter), workflow]
        if change:
            inputs = [node["inputs"] for node in change(LAYERS).values()]
            values = [value for given in inputs for value in given.values()]
            named[:0] = [(workflow, value) for value in values if isinstance(value, str)]
        named.insert(0, (workflow, weight))
        return next(self.pictures[name] for name in named if name in self.pictures)


def test_figures_of_the_variants(task, monkeypatch):
    """The fine-grained one gives what is asked for, the others a stranger."""
    asked = render(replace(task.rows, shape=task.told))
    strangers = task.pictures.roll(1, 0)
    told = []
    monkeypatch.setattr(
        findings.concatenated, "draw", lambda _, texts: told.append(texts) or strangers
    )
    monkeypatch.setattr(
        findings.files, "manifest", lambda: {"files": {findings.files.CONCATENATED: {}}}
    )
    pictures = {
        ("image_only", "fine-grained"): task.pictures[:, None],
        ("text_and_image", "fine-grained"): asked[:, None],
    }
    found = findings.variants(Told(task, pictures), Similarity(), strangers, strangers)
    for setting in ("text_and_image", "image_only"):
        closest, other = found["fine_grained"][setting], found["base"][setting]
        assert closest["image_similarity"] > other["image_similarity"] + 0.2
        assert closest["distance"] == closest["displacement"] == 0
        assert found["strangers"][setting]["displacement"] > 2
        assert other["distance"] > 10 and other["displacement"] > 2
        assert closest["shade_error"] == 0 and other["shade_error"] > 20
    alone = found["fine_grained"]["image_only"]["image_similarity"]
    assert alone == pytest.approx(1, abs=1e-4)
    assert found["strangers"]["image_only"] == found["base"]["image_only"]
    assert found["concatenated"] == found["base"]
    assert told == [task.texts, [""] * len(task.rows)]


def test_figures_of_several_references(task, judged):
    second = pairs.partners(task.rows)
    both = task.pictures, task.pictures[second]
    draw = Told(
        task,
        {
            "several_images_concat": both[1][:, None],
            "several_images_average": both[0][torch.randperm(24)][:, None],
            "several_images_per_latent": torch.stack(both, 1),
        },
    )
    found = findings.several_references(draw, judged, Similarity())
    assert found["concat"]["colour_of_either"] == 1
    assert found["concat"]["image_similarity"][1] == pytest.approx(1, abs=1e-4)
    assert found["concat"]["image_similarity"][0] < 0.8
    assert found["average"]["colour_of_either"] < 0.8
    assert found["per_latent"]["colour_of_own"] == found["per_latent"]["background_of_own"] == 1
    assert found["per_latent"]["colour_of_other"] == 0


def test_figures_of_structure(task, judged):
    rows = scenes(findings.setup.SHOWN, 24, findings.STRUCTURES + task.seeds[0])
    followed = render(replace(rows, colour=task.rows.colour, background=task.rows.background))
    pictures = {
        "controlnet": followed,
        ("image_to_image", 1.0): replace(rows, colour=task.rows.colour),
        ("image_to_image", 0.0): rows,
    }
    pictures = {
        name: made if isinstance(made, Tensor) else render(made) for name, made in pictures.items()
    }
    found = findings.structure(
        Told(task, {name: made[:, None] for name, made in pictures.items()}),
        judged,
        task.pictures,
    )
    assert min(found["shape_of_edges"], found["colour"], found["background"]) > 0.95
    assert found["overlap"] > 0.9 > 0.7 > found["overlap_without"]
    start = found["image_to_image"]
    assert start["overlap"] > 0.9 > start["overlap_without"] + 0.2
    assert start["overlap_of_start"] > 0.9
    assert start["colour"] > 0.95 > 0.5 > start["colour_without"]


def test_figures_of_another_base(task, judged):
    """Outlined on the second base, and plain on the first."""
    first, second = (draw(replace(task.rows, shape=task.told)) for draw in (render, outlined))
    pictures = {("text_and_image", SECOND): second[:, None], "text_and_image": first[:, None]}
    found = findings.another_base(Told(task, pictures), judged, first)
    assert min(found[kind] for kind in ("colour", "background", "shape_kept")) > 0.8
    assert found["whiteness_of_outlines"] > found["whiteness_on_the_first_base"] + 0.2


def test_figures_of_regions(task, judged):
    """A shape before another's background, and the other way round."""
    second = pairs.partners(task.rows)
    outer = task.rows[second]
    right = render(replace(task.rows, background=outer.background))
    draw = Told(task, {"regions": right[:, None]})
    found = toolbox.regions(draw, judged)
    assert found["colour_of_inner"] == found["background_of_outer"] == 1
    assert found["colour_of_outer"] == found["background_of_inner"] == 0

    wrong = Told(task, {"regions": task.pictures[second][:, None]})
    found = toolbox.regions(wrong, judged)
    assert found["colour_of_inner"] == 0 and found["colour_of_outer"] == 1


def test_figures_of_style(task, judged):
    """The preset's pictures have the look elsewhere, the others all or nothing."""
    rows = task.rows
    left = replace(rows, shape=task.told, background=(rows.background + 1) % 5, x=-rows.x)
    pictures = {
        ("style_transfer", 0.5): task.pictures.roll(2, 0),
        ("style_transfer", "uniform"): task.pictures,
        ("style_transfer", "style"): render(left),
        ("style_transfer", "composition"): task.pictures.roll(1, 0),
    }
    draw = Told(task, {name: made[:, None] for name, made in pictures.items()})
    found = toolbox.style(draw, judged, Similarity())
    assert draw.texts == [""] * len(rows)
    assert found["uniform"]["displacement"] == 0 < 2 < found["style"]["displacement"]
    for name in ("uniform", "style"):
        assert min(found[name][kind] for kind in ("colour", "texture")) > 0.9
    for kind in ("shape", "background"):
        assert found["uniform"][kind] > 0.9 > 0.1 > found["style"][kind]
    assert found["composition"]["colour"] < 0.5 and found["weaker"]["colour"] < 0.5


def test_figures_of_the_map(task):
    disc = toolbox.mask().float()
    maps = (0.1 + 0.8 * disc).expand(24, 1, 3, 64, 64)
    found = toolbox.heat(Told(task, {"attention_map": maps}))
    assert found == {
        "inside": pytest.approx(0.9),
        "outside": pytest.approx(0.1),
        "overlap": 1,
    }
