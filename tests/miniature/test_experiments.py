"""Drawing by several servers, and the experiments' figures, on images for which they are known."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from miniature import assemble, experiments
from miniature.metrics import Similarity
from miniature.scenes import outlined, render, scenes
from miniature.through_comfyui import Drawer, Task
from miniature.workflows import SECOND
from tests.support import image_folders
from tools.workflows.api import of_class


@pytest.fixture
def task():
    return Task.of(24, seed=3)


def test_partners_share_neither_colour_nor_background(task):
    second = experiments.partners(task.rows)
    groups = [[number, other] for number, other in enumerate(second.tolist())]
    third = experiments.unlike(task.rows, groups)
    for kind in ("colour", "background"):
        values = getattr(task.rows, kind)
        assert (values != values[second]).all()
        assert (values != values[third]).all() and (values[second] != values[third]).all()
    assert len(set(third.tolist())) > 8
    with pytest.raises(ValueError, match="None of 1 scenes"):
        experiments.partners(task.rows[:1])


LAYERS = {
    "1": {"class_type": "IPA_LayerWeights", "inputs": {}},
    "2": {"class_type": "IPA_AttentionMap", "inputs": {}},
    "3": {"class_type": "SaveImage", "inputs": {}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {}},
}


class Known:
    """Stands in for a Drawer: gives images that are known, by workflow."""

    def __init__(self, task, images):
        self.task, self.images = task, images
        self.names = [f"{number}.png" for number in task.seeds]

    def write_inputs(self, stem, rows):
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
        return next(self.images[name] for name in named if name in self.images)


def test_figures_of_the_variants(task, monkeypatch):
    """The fine-grained one gives what is asked for, the others a stranger."""
    asked = render(replace(task.rows, shape=task.shapes))
    strangers = task.images.roll(1, 0)
    given = []
    monkeypatch.setattr(
        experiments.concatenated, "draw", lambda _, texts: given.append(texts) or strangers
    )
    images = {
        ("image_only", "fine-grained"): task.images[:, None],
        ("text_and_image", "fine-grained"): asked[:, None],
    }
    found = experiments.variants(Known(task, images), Similarity(), strangers, strangers)
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
    assert given == [task.texts, [""] * len(task.rows)]


def test_figures_of_several_references(task, classify):
    second = experiments.partners(task.rows)
    both = task.images, task.images[second]
    draw = Known(
        task,
        {
            "several_images_concat": both[1][:, None],
            "several_images_average": both[0][torch.randperm(24)][:, None],
            "several_images_per_latent": torch.stack(both, 1),
        },
    )
    found = experiments.several_references(draw, classify, Similarity())
    assert found["concat"]["colour_of_either"] == 1
    assert found["concat"]["image_similarity"][1] == pytest.approx(1, abs=1e-4)
    assert found["concat"]["image_similarity"][0] < 0.8
    assert found["average"]["colour_of_either"] < 0.8
    assert found["per_latent"]["colour_of_own"] == found["per_latent"]["background_of_own"] == 1
    assert found["per_latent"]["colour_of_other"] == 0


def test_figures_of_structure(task, classify):
    rows = scenes(assemble.SHOWN, 24, experiments.STRUCTURES + task.seeds[0])
    followed = render(replace(rows, colour=task.rows.colour, background=task.rows.background))
    images = {
        "controlnet": followed[:, None],
        ("image_to_image", 1.0): render(replace(rows, colour=task.rows.colour))[:, None],
        ("image_to_image", 0.0): render(rows)[:, None],
    }
    found = experiments.structure(Known(task, images), classify, task.images)
    assert min(found["shape_of_edges"], found["colour"], found["background"]) > 0.95
    assert found["overlap"] > 0.9 > 0.7 > found["overlap_without"]
    start = found["image_to_image"]
    assert start["overlap"] > 0.9 > start["overlap_without"] + 0.2
    assert start["overlap_of_start"] > 0.9
    assert start["colour"] > 0.95 > 0.5 > start["colour_without"]


def test_figures_of_another_base(task, classify):
    """Outlined on the second base, and plain on the first."""
    first, second = (draw(replace(task.rows, shape=task.shapes)) for draw in (render, outlined))
    images = {("text_and_image", SECOND): second[:, None], "text_and_image": first[:, None]}
    found = experiments.another_base(Known(task, images), classify, first)
    assert min(found[kind] for kind in ("colour", "background", "shape_kept")) > 0.8
    assert found["whiteness_of_outlines"] > found["whiteness_on_the_first_base"] + 0.2


def test_figures_of_regions(task, classify):
    """A shape before another's background, and the other way round."""
    second = experiments.partners(task.rows)
    outer = task.rows[second]
    right = render(replace(task.rows, background=outer.background))
    draw = Known(task, {"regions": right[:, None]})
    found = experiments.regions(draw, classify)
    assert found["colour_of_inner"] == found["background_of_outer"] == 1
    assert found["colour_of_outer"] == found["background_of_inner"] == 0

    wrong = Known(task, {"regions": task.images[second][:, None]})
    found = experiments.regions(wrong, classify)
    assert found["colour_of_inner"] == 0 and found["colour_of_outer"] == 1


def test_figures_of_style(task, classify):
    """The preset's images have the look elsewhere, the others all or nothing."""
    rows = task.rows
    left = replace(rows, shape=task.shapes, background=(rows.background + 1) % 5, x=-rows.x)
    images = {
        ("style_transfer", 0.5): task.images.roll(2, 0),
        ("style_transfer", "uniform"): task.images,
        ("style_transfer", "style"): render(left),
        ("style_transfer", "composition"): task.images.roll(1, 0),
    }
    draw = Known(task, {name: made[:, None] for name, made in images.items()})
    found = experiments.style(draw, classify, Similarity())
    assert draw.texts == [""] * len(rows)
    assert found["uniform"]["displacement"] == 0 < 2 < found["style"]["displacement"]
    for name in ("uniform", "style"):
        assert min(found[name][kind] for kind in ("colour", "texture")) > 0.9
    for kind in ("shape", "background"):
        assert found["uniform"][kind] > 0.9 > 0.1 > found["style"][kind]
    assert found["composition"]["colour"] < 0.5 and found["weaker"]["colour"] < 0.5


def test_figures_of_the_map(task):
    disc = experiments.mask().float()
    maps = (0.1 + 0.8 * disc).expand(24, 1, 3, 64, 64)
    found = experiments.attention_map(Known(task, {"attention_map": maps}))
    assert found == pytest.approx({"inside": 0.9, "outside": 0.1, "overlap": 1})


class Server:
    """Draws one grey for each noise, and waits with its first until another server draws too."""

    def __init__(self, meeting):
        self.meeting, self.busy, self.drawn = meeting, threading.Lock(), 0

    def run(self, prompt):
        assert self.busy.acquire(blocking=False), "a server was given two prompts at once"
        if not self.drawn:
            self.meeting.wait(timeout=20)
        self.drawn += 1
        (sampler,) = of_class(prompt, "KSampler")
        (saver,) = (name for name, node in prompt.items() if node["class_type"] == "SaveImage")
        grey = Image.new("RGB", (8, 8), (sampler["seed"] % 256,) * 3)
        self.busy.release()
        return SimpleNamespace(images={saver: [image_folders.encoded(grey)]})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_servers_share_the_work_and_the_order_stays(tmp_path, count):
    meeting = threading.Barrier(count)
    servers = [Server(meeting) for _ in range(count)]
    task = Task.of(12, seed=0)
    drawn = Drawer(servers, task, tmp_path)("text_and_image")
    assert drawn.shape == (12, 1, 3, 8, 8)
    shown = (drawn[:, 0, 0, 0, 0] * 255).round().int().tolist()
    assert shown == [seed % 256 for seed in task.seeds]
    assert sum(server.drawn for server in servers) == 12
    assert all(server.drawn for server in servers)


def test_what_a_server_raises_is_raised(tmp_path):
    failing = SimpleNamespace(run=lambda prompt: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Drawer([failing], Task.of(8, seed=0), tmp_path)("text_and_image")
