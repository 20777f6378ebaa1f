"""What an image prompt does, seen by the judge, through ComfyUI and the shipped workflows."""

from __future__ import annotations

import pytest
import torch

from miniature import toolbox
from miniature.drawing import Drawer, Task
from miniature.evaluate import measured
from miniature.metrics import Similarity, chance, displacement
from miniature.scenes import KINDS

COUNT = 16


@pytest.fixture(scope="module")
def task():
    return Task.of(COUNT, seed=7)


@pytest.fixture(scope="module")
def draw(client, world, task):
    return Drawer([client], task, world / "input")


@pytest.fixture(scope="module")
def at(draw):
    """The pictures of each λ, drawn once."""
    made = {}

    def at(weight):
        if weight not in made:
            made[weight] = draw("text_and_image", weight)[:, 0]
        return made[weight]

    return at


def test_the_text_never_names_the_references_shape(task):
    assert (task.told != task.rows.shape).all()
    assert len(set(task.told.tolist())) > 3


def shares(judged, pictures, task):
    found = judged(pictures)
    return {kind: float((found[kind] == getattr(task.rows, kind)).float().mean()) for kind in KINDS}


def test_the_reference_is_followed_at_1_and_not_at_0(at, judged, task):
    """Of 16; `nox -s evaluate` says it of 64, the card of the miniature what it said."""
    without, full = shares(judged, at(0.0), task), shares(judged, at(1.0), task)
    found = judged(at(0.0))
    for kind in ("colour", "texture", "background"):
        by_chance = chance(found[kind], getattr(task.rows, kind))
        assert without[kind] <= by_chance.high, (without, by_chance)
        assert full[kind] >= 0.75, (kind, without, full)


def test_likeness_to_the_reference_rises(at, task):
    alike = Similarity()
    means = [float(alike(at(weight), task.pictures).mean()) for weight in (0.0, 1.0)]
    assert means[1] > means[0] + 0.4, means


def test_the_text_keeps_the_shape(at, judged, task):
    kept = float((judged(at(1.0))["shape"] == task.told).float().mean())
    assert kept >= 0.8


def test_without_a_text_the_image_alone_is_followed(draw, judged, task):
    made = draw("image_only")[:, 0]
    alone = shares(judged, made, task)
    assert min(alone[kind] for kind in ("colour", "texture", "background")) >= 0.75, alone
    likeness = Similarity()
    assert (
        float(likeness(made, task.pictures).mean())
        > 0.8
        > 0.3
        > float(likeness(made, task.pictures.roll(1, 0)).mean())
    )


def test_only_the_fine_grained_adapter_knows_where_a_shape_lies(draw, task):
    """The embedding says nothing of it, the encoder's patches do."""
    base, fine = (
        displacement(draw("image_only", adapter=kind)[:, 0], task.pictures)
        for kind in ("base", "fine-grained")
    )
    assert fine < base - 0.5, (fine, base)


def test_regions_take_each_its_own_reference(draw, judged):
    found = toolbox.regions(draw, judged)
    assert found["colour_of_inner"] >= 0.7 > 0.2 >= found["colour_of_outer"], found
    assert found["background_of_outer"] >= 0.75 > 0.25 >= found["background_of_inner"], found


def test_the_map_lies_where_the_mask_let_the_image_act(draw):
    found = toolbox.heat(draw)
    assert found["inside"] > 3 * found["outside"], found


def test_every_picture_of_a_reference_counts(task, judged):
    """One of four pictures at λ = 0 follows, the others show what follows nothing."""
    names = [*(f"text {w:g}" for w in (0, 0.25, 0.5, 0.75, 1))]
    names += ["image only", "fine-grained", "described"]
    drawn = dict.fromkeys(names, task.pictures[:, None])
    nothing = torch.zeros_like(task.pictures)
    alone = measured({**drawn, "text 0": nothing[:, None]}, task, judged)
    one = torch.stack([task.pictures, nothing, nothing, nothing], 1)
    found = measured({**drawn, "text 0": one}, task, judged)
    for kind in ("colour", "background"):
        expected = (1 + 3 * alone[f"{kind}_at_zero"]) / 4
        assert found[f"{kind}_at_zero"] == pytest.approx(expected, abs=1e-6)


def test_the_figures_say_one_where_everything_follows(task, judged):
    """References in place of results: what follows is all, and no text is kept."""
    names = [
        *(f"text {w:g}" for w in (0, 0.25, 0.5, 0.75, 1)),
        "image only",
        "fine-grained",
        "described",
    ]
    found = measured(dict.fromkeys(names, task.pictures[:, None]), task, judged)
    assert min(found[f"{kind}_follows"] for kind in ("colour", "texture", "background")) > 0.95
    assert found["shape_kept"] < 0.1
    assert found["image_similarity"]["1"] == pytest.approx(1, abs=1e-4)
    assert found["image_similarity_of_strangers"] < 0.8
    assert found["fine_grained_over_base"] == pytest.approx(0, abs=1e-6)
