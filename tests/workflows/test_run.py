"""Every workflow on the real server, with stand-in models: few steps, small pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.reference_images import draw as scene
from tools.workflows.api import smaller

STEPS, SIDE = 2, 128
Pictures = list[np.ndarray]


def on_standins(api: Any) -> dict[str, Any]:
    """Less work, and a preset for any model: the stand-ins have other blocks than SD1.5."""
    made = smaller(api, STEPS, SIDE)
    for node in made.values():
        if node["class_type"] == "IPA_LayerWeights":
            node["inputs"]["preset"] = "ease out"
    return made


@pytest.fixture(scope="module")
def run(client, pictures) -> Callable[[Any], Pictures]:
    """Runs a workflow once and gives its pictures."""
    done: dict[str, Pictures] = {}

    def once(workflow: Any) -> Pictures:
        if workflow.name not in done:
            result = client.run(on_standins(workflow.api))
            (saved,) = (i for i, n in workflow.api.items() if n["class_type"] == "SaveImage")
            result.images = {saved: result.images[saved]}  # without previews
            done[workflow.name] = pictures(result)
        return done[workflow.name]

    return once


def test_it_runs_to_pictures(workflow, run):
    api = smaller(workflow.api, STEPS, SIDE)
    sized = [node["inputs"] for node in api.values() if "height" in node["inputs"]]
    sized = [inputs for inputs in sized if isinstance(inputs["height"], int)]
    count = max(inputs.get("batch_size", 1) for inputs in sized)
    made = run(workflow)
    assert len(made) == count
    for picture in made:
        if workflow.name != "weight_start_grid":  # whose size follows from the words at its edges
            assert picture.shape == (sized[0]["height"], sized[0]["width"], 3)
        # Not a number would come out as one flat black.
        assert picture.std(axis=(0, 1)).min() > 2, "a flat picture"
        assert 5 < picture.mean() < 250


def test_each_latent_follows_its_own_picture(reading, run):
    """The first of three is what its picture gives alone: seed and settings are the same."""
    alone = run(reading("image_only"))[0]
    first, *others = run(reading("several_images_per_latent"))
    assert np.abs(first - alone).max() <= 2
    assert all(np.abs(other - alone).mean() > 5 for other in others)


def test_ways_to_combine_differ(reading, run):
    made = [run(reading(f"several_images_{way}"))[0] for way in ("concat", "average")]
    made.append(run(reading("image_only"))[0])
    for index, picture in enumerate(made):
        for other in made[:index]:
            assert np.abs(picture - other).mean() > 1


def test_another_checkpoint_is_another(reading, run):
    one, other = run(reading("image_only"))[0], run(reading("another_checkpoint"))[0]
    assert np.abs(one - other).mean() > 5


def test_inpainting_changes_the_white_part_alone(reading, run):
    (made,) = run(reading("inpainting"))
    start, mask = (
        np.asarray(scene(name).resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)
        for name in ("reference_3.png", "mask.png")
    )
    difference = np.abs(made - start).mean(axis=2)
    assert difference[mask[..., 0] < 1].mean() < 2
    assert difference[mask[..., 0] > 254].mean() > 20


def test_each_prompt_follows_its_own_picture(client, reading, pictures):
    """The texts are alike, so that exchanging the pictures is exchanging the regions."""
    api = smaller(reading("per_prompt").api, STEPS, SIDE // 2)

    def exchanged(class_: str, input_: str) -> dict[str, Any]:
        made = copy.deepcopy(api)
        one, other = (node["inputs"] for node in made.values() if node["class_type"] == class_)
        one[input_], other[input_] = other[input_], one[input_]
        return made

    (as_is,) = pictures(client.run(api))
    (pictures_exchanged,) = pictures(client.run(exchanged("LoadImage", "image")))
    (regions_exchanged,) = pictures(client.run(exchanged("ConditioningSetAreaPercentage", "x")))
    assert np.abs(pictures_exchanged - regions_exchanged).max() <= 2
    assert np.abs(pictures_exchanged - as_is).mean() > 5


def test_a_grid_holds_the_pictures_of_its_values(reading, client, pictures, run):
    """The cell of weight 0.5 and start 0.2 is what Apply gives with these alone."""
    (sheet,) = run(reading("weight_start_grid"))
    api = smaller(reading("weight_start_grid").api, STEPS, SIDE)
    (apply,) = (node for node in api.values() if node["class_type"] == "IPA_Apply")
    apply["inputs"] |= {"weight": 0.5, "start_at": 0.2}
    decoded = next(i for i, node in api.items() if node["class_type"] == "VAEDecode")
    (save,) = (node for node in api.values() if node["class_type"] == "SaveImage")
    save["inputs"]["images"] = [decoded, 0]
    for name in ("IPA_GridValues", "IPA_DrawGrid"):
        del api[next(i for i, node in api.items() if node["class_type"] == name)]
    (alone,) = pictures(client.run(api))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (SIDE, SIDE), (0, 1))
    cell = alone.transpose(2, 0, 1)
    corners = np.argwhere((np.abs(windows[:, :, :, 0, 0] - cell[:, 0, 0]) <= 2).all(-1))
    assert any(np.abs(windows[y, x] - cell).max() <= 2 for y, x in corners)  # rounded twice


def test_a_saved_prompt_draws_what_its_picture_does(reading, run):
    (loaded,), (encoded,) = run(reading("load_prompt")), run(reading("save_prompt"))
    np.testing.assert_array_equal(loaded, encoded)


def test_a_saved_prompt_lies_in_the_output_folder(reading, client):
    result = client.run(smaller(reading("save_prompt").api, STEPS, SIDE))
    (saved,) = (
        node["image_prompts"][0] for node in result.outputs.values() if "image_prompts" in node
    )
    assert (saved["subfolder"], saved["type"]) == ("image_prompts", "output")
    assert client.view(saved)[8:9] == b"{"  # a safetensors file
