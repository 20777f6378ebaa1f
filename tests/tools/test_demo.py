"""The demo's parts: the workflow it posts, and the sheet it draws."""

from __future__ import annotations

import json

from PIL import Image

from tools import demo, pictures
from tools.ask import Ask
from tools.sheet import contact_sheet


def ask() -> Ask:
    reference = pictures.picture("reference.png")
    return Ask(reference, "a boat", "blurred", (0.0, 1.0), size=64, steps=3, guidance=5.0, seed=9)


def test_the_workflow_gets_the_demos_values_and_stays_itself():
    workflow = json.loads(demo.WORKFLOW.read_text("utf-8"))
    before = json.dumps(workflow)
    prompt = demo.adjusted(workflow, ask(), 0.5)
    assert json.dumps(workflow) == before
    assert [x["weight"] for x in demo.of_class(prompt, "IPA_Apply")] == [0.5]
    assert [(x["steps"], x["seed"]) for x in demo.of_class(prompt, "KSampler")] == [(3, 9)]
    assert [x["width"] for x in demo.of_class(prompt, "EmptyLatentImage")] == [64]
    assert prompt.keys() == workflow.keys()


def test_both_texts_are_found():
    positive, negative = demo.texts(json.loads(demo.WORKFLOW.read_text("utf-8")))
    assert positive and negative and positive != negative


def test_the_sheet_shows_the_reference_and_every_picture():
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    cells = [Image.new("RGB", (80, 60), colour) for colour in colours]
    sheet = contact_sheet(cells[0], [(0.0, cells[1]), (1.0, cells[2])], "a boat", ["a note"])
    shown = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert shown.issuperset(colours)
    assert sheet.width > 3 * 320
