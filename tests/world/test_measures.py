"""Overlap, whiteness and the findings' figures, on pictures for which they are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tools.world import control, findings
from tools.world.drawing import Task
from tools.world.measures import Similarity, chance_interval, overlap, whiteness_of_outlines
from tools.world.scenes import outlines, render, scenes

ROWS = scenes(1 << 41, 64)


def test_shapes_where_they_are_asked_for_overlap_and_shifted_ones_less():
    asked = outlines(ROWS, 64)
    assert overlap(render(ROWS), asked) > 0.9
    assert 0.2 < overlap(render(replace(ROWS, x=ROWS.x + 0.3)), asked) < 0.75
    assert overlap(render(ROWS), 1 - asked) < 0.1


def test_outlines_of_the_second_style_are_white():
    dark = ROWS[torch.isin(ROWS.background, torch.tensor([1, 4]))]  # where an outline is seen
    assert whiteness_of_outlines(control.outlined(dark)) > 0.6
    assert whiteness_of_outlines(render(dark)) < 0.3


def test_the_interval_of_chance_holds_99_of_100():
    low, high = chance_interval(0.2, 64)
    draws = torch.rand(20_000, 64, generator=torch.Generator().manual_seed(0)) < 0.2
    shares = draws.float().mean(1)
    assert 0.98 < float(((shares >= low) & (shares <= high)).float().mean()) <= 0.999


@pytest.fixture
def task():
    return Task.of(24, seed=3)


def test_partners_share_neither_colour_nor_background(task):
    second = findings.partners(task.rows)
    for kind in ("colour", "background"):
        values = getattr(task.rows, kind)
        assert (values != values[second]).all()


class Told:
    """Stands in for a Drawer: gives pictures that are known, by workflow."""

    def __init__(self, task, pictures):
        self.task, self.pictures = task, pictures
        self.names = [f"{number}.png" for number in task.seeds]

    def lay(self, stem, rows):
        return [f"{stem}.png"] * len(rows)

    def __call__(self, workflow, weight=1.0, adapter="base", **_):
        return self.pictures[workflow]


def test_figures_of_several_references(task, judged):
    second = findings.partners(task.rows)
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
    pictures = {"controlnet": followed, "image_only": task.pictures, "image_to_image": render(rows)}
    found = findings.structure(
        Told(task, {name: made[:, None] for name, made in pictures.items()}), judged
    )
    assert min(found["shape_of_edges"], found["colour"], found["background"]) > 0.95
    assert found["overlap"] > 0.9 > 0.7 > found["overlap_without"]
    assert found["image_to_image"]["overlap"] == found["image_to_image"]["overlap_of_start"]
    assert found["image_to_image"]["colour"] < 0.5
