"""What an image prompt does, seen by the judge, through ComfyUI and the shipped workflows."""

from __future__ import annotations

import pytest
import torch

from tools.world import setup
from tools.world.evaluate import Drawer, Similarity, Task, chance_interval, measured
from tools.world.scenes import KINDS, caption, render, scenes
from tools.world.workflows import given, on_miniature

COUNT = 16


@pytest.fixture(scope="module")
def task():
    return Task.of(COUNT, seed=7)


@pytest.fixture(scope="module")
def draw(client, world, task):
    return Drawer(client, task, world / "input")


@pytest.fixture(scope="module")
def follows(draw, task, judged):
    """Shares of pictures that show the reference's colour and so on, and the text's shape."""

    def follows(weight, adapter="base"):
        found = judged(draw("text_and_image", weight, adapter))
        wanted = {kind: getattr(task.rows, kind) for kind in KINDS} | {"shape": task.told}
        return {kind: float((found[kind] == wanted[kind]).float().mean()) for kind in KINDS}

    return follows


def test_the_text_never_names_the_references_shape(task):
    assert (task.told != task.rows.shape).all()
    assert len(set(task.told.tolist())) > 3


@pytest.mark.parametrize("adapter", ["base", "fine-grained"])
def test_at_1_colour_texture_and_background_come_from_the_reference(follows, adapter):
    found = follows(1.0, adapter)
    for kind in ("colour", "texture", "background"):
        assert found[kind] >= 0.7, found
    assert found["shape"] >= 0.6, found


def test_at_0_they_come_from_chance(follows):
    found = follows(0.0)
    for kind in ("colour", "texture", "background"):
        assert found[kind] <= chance_interval(1 / KINDS[kind], COUNT)[1] + 1e-6, found


def test_each_latent_follows_its_own_reference(drawn, workflow, world, judged):
    rows = scenes(setup.SHOWN, 3, 500)
    names = [f"own_{number}.png" for number in range(3)]
    for name, number in zip(names, range(3), strict=True):
        setup.picture(rows[number : number + 1]).save(world / "input" / name)
    api = given(
        on_miniature(workflow("several_images_per_latent"), caption(0)),
        EmptyLatentImage={"batch_size": 3},
    )
    loaders = [node for node in api.values() if node["class_type"] == "LoadImage"]
    for node, name in zip(loaders, names, strict=True):
        node["inputs"]["image"] = name
    found = drawn(api)
    alike = Similarity()
    table = torch.stack(
        [alike(found, render(rows[i : i + 1]).expand(3, -1, -1, -1)) for i in range(3)]
    )
    assert table.argmax(0).tolist() == [0, 1, 2]


def test_the_figures_say_one_where_everything_follows(task, judged):
    """References in place of results: what follows is all, and no text is kept."""
    names = [*(f"text {w:g}" for w in (0, 0.25, 0.5, 0.75, 1)), "image only", "fine-grained"]
    found = measured(dict.fromkeys(names, task.pictures), task, judged)
    assert min(found[f"{kind}_follows"] for kind in ("colour", "texture", "background")) > 0.95
    assert found["shape_kept"] < 0.1
    assert found["image_similarity"]["1"] == pytest.approx(1, abs=1e-4)
    assert found["image_similarity_of_strangers"] < 0.8
    assert found["fine_grained_over_base"] == pytest.approx(0, abs=1e-6)
