"""The pictures beside the workflows show what the graphs do."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tools.comfyui.client import Result
from tools.workflows.api import read
from tools.workflows.pictures import (
    BOXES,
    LIMIT,
    RESULTS,
    SIDE,
    draw,
    images_of,
    in_order,
    jpeg,
    run_and_draw,
    stages_of,
)


def png(color):
    data = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(data, "PNG")
    return data.getvalue()


def test_every_picture_leads_into_a_stage_and_every_adapter_is_one(workflow):
    stages = stages_of(workflow.api)
    shown = {file for stage in stages for file in stage.files}
    assert shown == set(images_of(workflow.api).values())
    adapters = [stage for stage in stages if stage.label.startswith(("IP-Adapter", "FaceID"))]
    classes = [node["class_type"] for node in workflow.api.values()]
    applied = ("IPA_Apply", "IPA_ApplyConditioning", "IPA_ApplyRegions")
    assert len(adapters) == sum(name in applied for name in classes)
    if any(stage.label.startswith("ControlNet") for stage in stages):
        assert "ControlNetApplyAdvanced" in classes


def test_inputs_and_results_are_in_it(workflow):
    files = dict.fromkeys(images_of(workflow.api).values())
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250)][: len(files)]
    pairs = zip(files, colours, strict=False)
    loaded = {file: Image.new("RGB", (64, 48), colour) for file, colour in pairs}
    result = Image.new("RGB", (48, 64), (250, 250, 20))
    sheet = draw(workflow.api, loaded, [result, result])
    assert sheet.size == (SIDE, SIDE)
    shown = set(map(tuple, np.asarray(sheet).reshape(-1, 3)))
    assert {*colours, (250, 250, 20)} <= shown


def test_a_face_adapter_is_called_so():
    labels = [stage.label for stage in stages_of(read("face_and_style"))]
    assert labels == ["FaceID\nweight 0.8", "IP-Adapter\nweight 0.8"]
    assert [stage.label for stage in stages_of(read("two_faces"))] == ["FaceID\nregions"]


def test_of_faces_the_picture_has_what_encode_face_shows_and_no_result():
    """It runs no further, and no line leads from an adapter to what is no result."""
    api = read("face_and_style")
    ran = {}

    class Client:
        def view(self, image):
            return png("gray")

        def run(self, given):
            ran.update(given)
            (face,) = (id_ for id_, x in given.items() if x["class_type"] == "IPA_EncodeFace")
            return Result(images={face: [png("lime")]})

    sheet = np.asarray(run_and_draw(Client(), api, "", faces=True))
    classes = {node["class_type"] for node in ran.values()}
    assert classes == {"IPA_LoadFaceEncoder", "LoadImage", "IPA_EncodeFace"}
    assert (sheet[200:300, RESULTS[0] + 8 : RESULTS[1] - 8] == (0, 255, 0)).all()
    assert len(np.unique(sheet[60:420, BOXES[1] + 4 : RESULTS[0]].reshape(-1, 3), axis=0)) == 1


def test_a_saved_prompt_is_told_without_a_picture():
    (stage,) = stages_of(read("load_prompt"))
    assert stage.label == "IP-Adapter\nweight 1\nfrom a file" and stage.files == ()
    assert not any("file" in stage.label for stage in stages_of(read("save_prompt")))


def test_a_prompt_is_saved_before_it_is_loaded():
    assert in_order(["load_prompt"]) == ["save_prompt", "load_prompt"]
    asked = ["save_prompt", "regions", "load_prompt"]
    assert in_order(asked) == asked
    assert in_order(["load_prompt", "save_prompt"]) == ["save_prompt", "load_prompt"]


def test_noise_fits_into_the_limit():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert len(jpeg(Image.fromarray(noise))) <= LIMIT
