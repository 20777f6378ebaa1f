"""Every workflow on the real server: on the miniature, and by night on stand-ins of full width."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniature.workflows import on_miniature
from tools.comfyui.server import Client
from tools.workflows.api import smaller

SERVERS = {"miniature": "miniature_server", "stand-ins": "client"}  # fixtures
MODELS = [
    pytest.param("miniature", marks=pytest.mark.xdist_group("miniature_server")),
    pytest.param("stand-ins", marks=[pytest.mark.nightly, pytest.mark.xdist_group("_started")]),
]
Images = list[np.ndarray]


class Runs:
    """Workflows on one of the two sets of models, each run once."""

    def __init__(self, models: str, client: Client, images: Callable[..., Images]) -> None:
        self.models, self.client, self.images = models, client, images
        self.done: dict[str, Images] = {}

    def prepared(self, api: Any, side: int | None = None) -> dict[str, Any]:
        """Return the workflow with less work, and files and presets that the models have."""
        if self.models == "miniature":
            return on_miniature(api, "a star", steps=4)
        made = smaller(api, steps=2, side=side or 128)
        for node in made.values():
            if node["class_type"] == "IPA_LayerWeights":
                node["inputs"]["preset"] = "ease out"  # the stand-ins have other blocks
        return made

    def of(self, api: Any) -> Images:
        """Run a workflow for the images that it saves, without previews."""
        result = self.client.run(api)
        (saved,) = (id_ for id_, node in api.items() if node["class_type"] == "SaveImage")
        result.images = {saved: result.images[saved]}
        return self.images(result)

    def __call__(self, workflow: Any) -> Images:
        if workflow.name not in self.done:
            self.done[workflow.name] = self.of(self.prepared(workflow.api))
        return self.done[workflow.name]


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, images: Any) -> Runs:
    return Runs(request.param, request.getfixturevalue(SERVERS[request.param]), images)


def check(run: Runs, workflow: Any, side: int | None = None) -> None:
    """Run a workflow, and check the number, size and content of its images."""
    api = run.prepared(workflow.api, side)
    sized = [node["inputs"] for node in api.values() if "height" in node["inputs"]]
    sized = [inputs for inputs in sized if isinstance(inputs["height"], int)]
    made = run(workflow) if side is None else run.of(api)
    assert len(made) == max(inputs.get("batch_size", 1) for inputs in sized)
    for image in made:
        if workflow.name != "weight_start_grid":  # whose size follows from the words at its edges
            assert image.shape == (sized[0]["height"], sized[0]["width"], 3)
        # Not a number would come out as one flat black.
        assert image.std(axis=(0, 1)).min() > 2, "a flat image"
        assert 5 < image.mean() < 250


def test_every_workflow_runs_to_images(run, workflows, reading, subtests):
    run(reading("save_prompt"))  # whose file another loads
    for workflow in workflows:
        if (run.models, workflow.name) != ("miniature", "sdxl"):  # which is of one family
            with subtests.test(workflow.name):
                check(run, workflow)


def test_sdxl_runs_to_an_image(client, images, reading):
    """On a stand-in by day too: the miniature is of one family."""
    check(Runs("stand-ins", client, images), reading("sdxl"), side=64)


def test_each_latent_follows_its_own_image(reading, run):
    """The first of three is what its image gives alone: seed and settings are the same."""
    alone = run(reading("image_only"))[0]
    first, *others = run(reading("several_images_per_latent"))
    assert np.abs(first - alone).max() <= 2
    assert all(np.abs(other - alone).mean() > 5 for other in others)


def test_ways_to_combine_differ(reading, run):
    made = [run(reading(f"several_images_{way}"))[0] for way in ("concat", "average")]
    made.append(run(reading("image_only"))[0])
    for index, image in enumerate(made):
        for other in made[:index]:
            assert np.abs(image - other).mean() > 1


def test_another_checkpoint_is_another(reading, run):
    one, other = run(reading("image_only"))[0], run(reading("another_checkpoint"))[0]
    assert np.abs(one - other).mean() > 5


def test_inpainting_changes_the_white_part_alone(reading, run):
    (made,) = run(reading("inpainting"))
    nodes = run.prepared(reading("inpainting").api).values()
    files = {n["_meta"]["title"]: n["inputs"].get("image") for n in nodes}
    start, mask = (
        run.client.view({"filename": file, "type": "input"})
        for title, file in files.items()
        if title in ("Picture to repaint", "Mask: white is repainted")
    )
    side = made.shape[:2]
    start, mask = (
        np.asarray(Image.open(io.BytesIO(x)).convert("RGB").resize(side, Image.BICUBIC), float)
        for x in (start, mask)
    )
    difference = np.abs(made - start).mean(axis=2)
    assert difference[mask[..., 0] < 1].mean() < 2
    assert difference[mask[..., 0] > 254].mean() > 20


def test_each_prompt_follows_its_own_image(reading, run):
    """The texts are alike, so that exchanging the images is exchanging the regions."""
    api = run.prepared(reading("per_prompt").api, side=64)

    def exchanged(class_: str, input_: str) -> dict[str, Any]:
        made = copy.deepcopy(api)
        one, other = (node["inputs"] for node in made.values() if node["class_type"] == class_)
        one[input_], other[input_] = other[input_], one[input_]
        return made

    (as_is,) = run.of(api)
    (images_exchanged,) = run.of(exchanged("LoadImage", "image"))
    (regions_exchanged,) = run.of(exchanged("ConditioningSetAreaPercentage", "x"))
    assert np.abs(images_exchanged - regions_exchanged).max() <= 2
    assert np.abs(images_exchanged - as_is).mean() > 5


def test_a_grid_holds_the_images_of_its_values(reading, run):
    """The cell of weight 0.5 and start 0.2 is what Apply gives with these alone."""
    api = run.prepared(reading("weight_start_grid").api)
    (sheet,) = run(reading("weight_start_grid"))
    (apply,) = (node for node in api.values() if node["class_type"] == "IPA_Apply")
    apply["inputs"] |= {"weight": 0.5, "start_at": 0.2}
    decoded = next(i for i, node in api.items() if node["class_type"] == "VAEDecode")
    (save,) = (node for node in api.values() if node["class_type"] == "SaveImage")
    save["inputs"]["images"] = [decoded, 0]
    for name in ("IPA_GridValues", "IPA_DrawGrid"):
        del api[next(i for i, node in api.items() if node["class_type"] == name)]
    (alone,) = run.of(api)
    factor = max(1, 160 // alone.shape[1])  # small ones are enlarged, so that the words have room
    alone = alone.repeat(factor, 0).repeat(factor, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, alone.shape[:2], (0, 1))
    cell = alone.transpose(2, 0, 1)
    corners = np.argwhere((np.abs(windows[:, :, :, 0, 0] - cell[:, 0, 0]) <= 2).all(-1))
    assert any(np.abs(windows[y, x] - cell).max() <= 2 for y, x in corners)  # rounded twice


def test_a_saved_prompt_draws_what_its_image_does(reading, run):
    (encoded,), (loaded,) = run(reading("save_prompt")), run(reading("load_prompt"))
    np.testing.assert_array_equal(loaded, encoded)


def test_a_saved_prompt_lies_in_the_output_folder(reading, run):
    result = run.client.run(run.prepared(reading("save_prompt").api))
    (saved,) = (
        node["image_prompts"][0] for node in result.outputs.values() if "image_prompts" in node
    )
    assert (saved["subfolder"], saved["type"]) == ("image_prompts", "output")
    assert run.client.view(saved)[8:9] == b"{"  # a safetensors file
