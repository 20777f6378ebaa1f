"""What an image prompt does, seen by the classifier, through ComfyUI and the shipped workflows."""

from __future__ import annotations

import pytest
import torch

from miniature import experiments
from miniature.evaluate import WEIGHTS, measured
from miniature.metrics import Similarity, chance, displacement, share
from miniature.through_comfyui import Drawer, Task

LOOKS = ("colour", "texture", "background")
SIXTEEN = pytest.mark.parametrize("task", [16], indirect=True)
SETTINGS = [*(f"text {w:g}" for w in WEIGHTS), "image only", "fine-grained"]
SETTINGS += ["concatenated", "described"]


@pytest.fixture(scope="module", params=[8, pytest.param(16, marks=pytest.mark.nightly)])
def task(request):
    return Task.of(request.param, seed=7)


@pytest.fixture(scope="module")
def draw(client, base_directory, task):
    return Drawer([client], task, base_directory / "input")


@pytest.fixture(scope="module")
def at(draw):
    """The images of each λ, drawn once."""
    drawn = {}

    def at(weight):
        if weight not in drawn:
            drawn[weight] = draw("text_and_image", weight)[:, 0]
        return drawn[weight]

    return at


def looks(classify, images, task):
    shown = classify(images)
    return {kind: share(shown[kind], getattr(task.rows, kind)) for kind in LOOKS}


def test_the_text_never_names_the_references_shape(task):
    assert (task.shapes != task.rows.shape).all()
    assert len(set(task.shapes.tolist())) > 3


def test_the_reference_is_followed_at_1_and_not_at_0(at, classify, task):
    """Of few; `nox -s evaluate` says it of 64, the miniature's card what it said."""
    without, full = looks(classify, at(0.0), task), looks(classify, at(1.0), task)
    found = classify(at(0.0))
    for kind in LOOKS:
        by_chance = chance(found[kind], getattr(task.rows, kind))
        assert without[kind] <= by_chance["high"], (without, by_chance)
        assert full[kind] >= 0.75, (kind, without, full)
    alike = Similarity()
    means = [float(alike(at(weight), task.images).mean()) for weight in (0.0, 1.0)]
    assert means[1] > means[0] + 0.4, means


def test_the_text_keeps_the_shape(at, classify, task):
    assert share(classify(at(1.0))["shape"], task.shapes) >= 0.8


def test_without_a_text_the_image_alone_is_followed(draw, classify, task):
    drawn = draw("image_only")[:, 0]
    alone = looks(classify, drawn, task)
    assert min(alone.values()) >= 0.75, alone
    alike = Similarity()
    own, strangers = (float(alike(drawn, x).mean()) for x in (task.images, task.images.roll(1, 0)))
    assert own > 0.8 > 0.3 > strangers


@pytest.mark.nightly
@SIXTEEN
def test_only_the_plus_adapter_knows_where_a_shape_lies(draw, task):
    """The embedding says nothing of it, the encoder's patches do."""
    base, plus = (
        displacement(draw("image_only", adapter=kind)[:, 0], task.images)
        for kind in ("base", "fine-grained")
    )
    assert plus < base - 0.5, (plus, base)


@pytest.mark.nightly
@SIXTEEN
def test_regions_take_each_its_own_reference(draw, classify):
    found = experiments.regions(draw, classify)
    assert found["colour_of_inner"] >= 0.7 > 0.2 >= found["colour_of_outer"], found
    assert found["background_of_outer"] >= 0.75 > 0.25 >= found["background_of_inner"], found


@pytest.mark.nightly
@SIXTEEN
def test_the_map_lies_where_the_mask_let_the_image_act(draw):
    found = experiments.attention_map(draw)
    assert found["inside"] > 3 * found["outside"], found


def test_every_image_of_a_reference_counts(task, classify):
    """One of four images at λ = 0 follows, the others show what follows nothing."""
    drawn = dict.fromkeys(SETTINGS, task.images[:, None])
    nothing = torch.zeros_like(task.images)
    alone = measured({**drawn, "text 0": nothing[:, None]}, task, classify)
    one = torch.stack([task.images, nothing, nothing, nothing], 1)
    found = measured({**drawn, "text 0": one}, task, classify)
    for kind in ("colour", "background"):
        expected = (1 + 3 * alone[f"{kind}_at_zero"]) / 4
        assert found[f"{kind}_at_zero"] == pytest.approx(expected, abs=1e-6)


def test_the_figures_say_one_where_everything_follows(task, classify):
    """References in place of results: what follows is all, and no text is kept."""
    found = measured(dict.fromkeys(SETTINGS, task.images[:, None]), task, classify)
    assert min(found[f"{kind}_follows"] for kind in LOOKS) > 0.95
    assert found["shape_kept"] < 0.1
    assert found["image_similarity"]["1"] == pytest.approx(1, abs=1e-4)
    assert found["image_similarity_of_strangers"] < 0.8
    assert found["fine_grained_over_base"] == pytest.approx(0, abs=1e-6)
