"""Every workflow on the real server: on the miniature, and by night on stand-ins of full width."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from PIL import Image

from miniature.workflows import on_miniature, runs
from tools.reference_images import EYES, MOUTH, NOSE
from tools.workflows.api import NAMES, needed, of_class, read, smaller

SERVERS = {"miniature": "miniature_server", "stand-ins": "client"}  # fixtures
ELSEWHERE = [name for name in NAMES if not runs(read(name))]
"""Workflows that the miniature has no models for."""
PARTS = [EYES, EYES, NOSE, MOUTH, MOUTH]
MODELS = [
    pytest.param("miniature", marks=pytest.mark.xdist_group("miniature_server")),
    pytest.param("stand-ins", marks=[pytest.mark.nightly, pytest.mark.xdist_group("_started")]),
]


class Runs:
    """Workflows on one of the two sets of models, each run once."""

    def __init__(self, models, client, images):
        self.models, self.client, self.images = models, client, images
        self.done = {}

    def prepared(self, name, side=128):
        """Return the workflow with less work, and files and presets that the models have."""
        if self.models == "miniature":
            return on_miniature(read(name), "a star", steps=4)
        made = smaller(read(name), steps=2, side=side)
        for inputs in of_class(made, "IPA_LayerWeights"):
            inputs["preset"] = "ease out"  # the stand-ins have other blocks
        return made

    def of(self, api):
        """Run a workflow for the images that it saves, without previews."""
        result = self.client.run(api)
        (saved,) = (id_ for id_, node in api.items() if node["class_type"] == "SaveImage")
        result.images = {saved: result.images[saved]}
        return self.images(result)

    def __call__(self, name, side=128):
        if name not in self.done:
            self.done[name] = self.of(self.prepared(name, side))
        return self.done[name]


@pytest.fixture(scope="module", params=MODELS)
def run(request, images):
    return Runs(request.param, request.getfixturevalue(SERVERS[request.param]), images)


def check(run, name, side=128):
    """Run a workflow, and check the number, size and content of its images."""
    sized = [node["inputs"] for node in run.prepared(name, side).values()]
    sized = [inputs for inputs in sized if isinstance(inputs.get("height"), int)]
    made = run(name, side)
    assert len(made) == max(inputs.get("batch_size", 1) for inputs in sized)
    for image in made:
        if name != "weight_start_grid":  # whose size follows from the words at its edges
            assert image.shape == (sized[0]["height"], sized[0]["width"], 3)
        # Not a number would come out as one flat black.
        assert image.std(axis=(0, 1)).min() > 2, "a flat image"
        assert 5 < image.mean() < 250


def test_every_workflow_runs_to_images(run, subtests):
    run("save_prompt")  # whose file another loads
    for name in NAMES:
        if run.models != "miniature" or name not in ELSEWHERE:
            with subtests.test(name):
                check(run, name)


@pytest.mark.xdist_group("_started")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_on_stand_ins_by_day_too(client, images, name):
    check(Runs("stand-ins", client, images), name, side=64)


@pytest.mark.xdist_group("_started")
@pytest.mark.parametrize("name", [name for name in ELSEWHERE if "face" in name])
def test_encode_face_points_at_the_parts_of_each_face(client, images, name):
    api = needed(read(name), "IPA_EncodeFace")
    shown = images(client.run(api))
    assert len(shown) == len([*of_class(api, "IPA_EncodeFace")])
    for picture in shown:
        red, green, blue = (np.argwhere((picture == c).all(-1)) for c in 255 * np.eye(3))
        nose = blue.mean(0)
        eyes = (five[five[:, 0] < nose[0]].mean(0) for five in (red, green))
        corners = (five[five[:, 0] > nose[0]].mean(0) for five in (red, green))
        inwards = zip((5, -5, 5, 6, -6), (*eyes, nose, *corners), PARTS, strict=True)
        for aside, (y, x), color in inwards:  # a marker covers three pixels to each side
            assert np.abs(picture[round(y), round(x + aside)] - color).max() < 20


@pytest.mark.xdist_group("_started")
def test_each_person_stands_where_the_mask_says(client, images):
    """Exchanging the pictures is inverting the mask."""
    run = Runs("stand-ins", client, images)
    api = run.prepared("two_faces", side=64)
    (as_is,) = run.of(api)
    one, other = of_class(api, "LoadImage")
    one["image"], other["image"] = other["image"], one["image"]
    (exchanged,) = run.of(api)
    (regions,) = of_class(api, "IPA_ApplyRegions")
    api["inverted"] = {"class_type": "InvertMask", "inputs": {"mask": regions["masks.mask0"]}}
    regions["masks.mask0"] = ["inverted", 0]
    (both,) = run.of(api)
    assert np.abs(both - as_is).max() <= 2
    assert np.abs(exchanged - as_is).mean() > 2


def test_each_latent_follows_its_own_image(run):
    """The first of three is what its image gives alone: seed and settings are the same."""
    alone = run("image_only")[0]
    first, *others = run("several_images_per_latent")
    assert np.abs(first - alone).max() <= 2
    assert all(np.abs(other - alone).mean() > 5 for other in others)


def test_ways_to_combine_differ(run):
    made = [run(f"several_images_{way}")[0] for way in ("concat", "average")]
    made.append(run("image_only")[0])
    for index, image in enumerate(made):
        for other in made[:index]:
            assert np.abs(image - other).mean() > 1


def test_another_checkpoint_is_another(run):
    one, other = run("image_only")[0], run("another_checkpoint")[0]
    assert np.abs(one - other).mean() > 5


def test_inpainting_changes_the_white_part_alone(run):
    (made,) = run("inpainting")
    nodes = run.prepared("inpainting").values()
    files = {n["_meta"]["title"]: n["inputs"].get("image") for n in nodes}

    def given(title):
        data = run.client.view({"filename": files[title], "type": "input"})
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(picture.resize(made.shape[:2], Image.BICUBIC), float)

    start, mask = given("Picture to repaint"), given("Mask: white is repainted")
    difference = np.abs(made - start).mean(axis=2)
    assert difference[mask[..., 0] < 1].mean() < 2
    assert difference[mask[..., 0] > 254].mean() > 20


def test_each_prompt_follows_its_own_image(run):
    """The texts are alike, so that exchanging the images is exchanging the regions."""
    api = run.prepared("per_prompt", side=64)

    def exchanged(class_, input_):
        made = copy.deepcopy(api)
        one, other = of_class(made, class_)
        one[input_], other[input_] = other[input_], one[input_]
        return made

    (as_is,) = run.of(api)
    (images_exchanged,) = run.of(exchanged("LoadImage", "image"))
    (regions_exchanged,) = run.of(exchanged("ConditioningSetAreaPercentage", "x"))
    assert np.abs(images_exchanged - regions_exchanged).max() <= 2
    assert np.abs(images_exchanged - as_is).mean() > 5


def test_a_grid_holds_the_images_of_its_values(run):
    """The cell of weight 0.5 and start 0.2 is what Apply gives with these alone."""
    api = run.prepared("weight_start_grid")
    (sheet,) = run("weight_start_grid")
    ids = {node["class_type"]: id_ for id_, node in api.items()}
    api[ids["IPA_Apply"]]["inputs"] |= {"weight": 0.5, "start_at": 0.2}
    api[ids["SaveImage"]]["inputs"]["images"] = [ids["VAEDecode"], 0]
    for name in ("IPA_GridValues", "IPA_DrawGrid"):
        del api[ids[name]]
    (alone,) = run.of(api)
    factor = max(1, 160 // alone.shape[1])  # small ones are enlarged, so that the words have room
    alone = alone.repeat(factor, 0).repeat(factor, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, alone.shape[:2], (0, 1))
    cell = alone.transpose(2, 0, 1)
    corners = np.argwhere((np.abs(windows[:, :, :, 0, 0] - cell[:, 0, 0]) <= 2).all(-1))
    assert any(np.abs(windows[y, x] - cell).max() <= 2 for y, x in corners)  # rounded twice


def test_a_saved_prompt_draws_what_its_image_does(run):
    (encoded,), (loaded,) = run("save_prompt"), run("load_prompt")
    np.testing.assert_array_equal(loaded, encoded)
