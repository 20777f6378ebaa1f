"""The pictures beside the workflows show what the graphs do."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tools.workflows.api import read
from tools.workflows.pictures import LIMIT, SIDE, draw, images_of, in_order, jpeg, stages_of


def test_every_picture_leads_into_a_stage_and_every_adapter_is_one(workflow):
    stages = stages_of(workflow.api)
    shown = {file for stage in stages for file in stage.files}
    assert shown == set(images_of(workflow.api).values())
    adapters = [stage for stage in stages if stage.label.startswith("IP-Adapter")]
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
