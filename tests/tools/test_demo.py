"""The demo's parts (the workflow it posts, the sheet it draws), and all of it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tools import demo, pictures
from tools.ask import Ask
from tools.sheet import CELL, GAP, HEAD, MARGIN, contact_sheet


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


@pytest.mark.parametrize("arguments", [[], ["--no-host"]], ids=["host", "no host"])
def test_the_demo_draws_the_reference_and_what_it_does(
    request, models, tmp_path, monkeypatch, capsys, arguments
):
    if not arguments:
        request.getfixturevalue("host_path")  # skips where there is none
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "output" / "demo.png")
    monkeypatch.setattr(sys, "argv", ["demo", "--size", "64", "--steps", "1", *arguments])
    demo.main()
    assert capsys.readouterr().out.splitlines()[-1] == str(demo.OUTPUT)

    sheet = Image.open(demo.OUTPUT).convert("RGB")
    weights = demo.WEIGHTS
    assert (weights[0], weights[-1]) == (0, 1)
    left = [MARGIN, *(MARGIN + GAP + n * (CELL + GAP) for n in range(1, len(weights) + 1))]
    assert 0 < sheet.width - (left[-1] + CELL) < CELL  # no room for more
    boxes = [(x, HEAD, x + CELL, HEAD + CELL) for x in left]
    reference, *drawn = (np.asarray(sheet.crop(box), float)[32:-32, 32:-32] for box in boxes)
    expected = pictures.picture("reference.png").convert("RGB").resize((CELL, CELL))
    assert np.abs(reference - np.asarray(expected, float)[32:-32, 32:-32]).mean() < 5
    assert all(picture.std() > 5 for picture in drawn)
    assert np.abs(drawn[-1] - drawn[0]).max() > 5
