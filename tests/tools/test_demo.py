"""The demo's parts (the workflow it posts, the sheet it draws), and all of it on both roads."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniature import assemble
from miniature.scenes import scenes
from tools import demo
from tools.demo_request import DemoRequest, DemoRow, Render
from tools.workflows.api import of_class, read


@pytest.fixture
def workflow():
    return read(demo.WORKFLOW)


def test_the_workflow_gets_the_demos_values_and_stays_itself(workflow):
    row = DemoRow("", "some.png", Image.new("RGB", (64, 64)), (Render(0.5, "a boat"),))
    ask = DemoRequest((row,), "blurred", size=64, steps=3, guidance=5.0, seed=9)
    before = json.dumps(workflow)
    prompt = demo.adjusted(workflow, ask, row, row.renders[0])
    assert json.dumps(workflow) == before
    assert [x["weight"] for x in of_class(prompt, "IPA_Apply")] == [0.5]
    assert [(x["steps"], x["seed"]) for x in of_class(prompt, "KSampler")] == [(3, 9)]
    assert [x["width"] for x in of_class(prompt, "EmptyLatentImage")] == [64]
    assert [x["image"] for x in of_class(prompt, "LoadImage")] == ["some.png"]
    assert demo.texts(prompt) == ("a boat", "blurred")
    assert prompt.keys() == workflow.keys()


def test_with_published_models_the_texts_are_the_workflows(workflow):
    positive, negative = demo.texts(workflow)
    assert positive and negative and positive != negative
    ask = demo.published_request(workflow, 1, None, None)
    assert {render.text for row in ask.rows for render in row.renders} == {positive}
    assert (ask.negative, ask.size, ask.steps, ask.guidance) == (negative, 512, 50, 7.5)


def test_the_sheet_shows_every_reference_and_every_picture():
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
    cells = [Image.new("RGB", (80, 60), colour) for colour in colours]
    growing = DemoRow("one", "", cells[0], (Render(0.0, "a boat"), Render(1.0, "a boat")))
    told = DemoRow("two", "", cells[1], (Render(1.0, "a boat"), Render(1.0, "")))
    sheet = demo.draw_sheet([growing, told], [[cells[2], cells[3]]] * 2, ["a note"])
    shown = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert shown.issuperset(colours)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="host", marks=pytest.mark.nightly),
        pytest.param(["--no-host"], id="no host"),
    ],
)
def test_the_demo_draws_its_sheet(tmp_path, monkeypatch, capsys, arguments, request):
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "output" / "demo.png")
    if arguments:  # by day
        monkeypatch.setattr(demo, "WEIGHTS", (0.0, 1.0))
        monkeypatch.setattr(demo, "TEXTS", ("circle",))
    else:
        request.getfixturevalue("host_path")  # skips where there is none
    monkeypatch.setattr(sys, "argv", ["demo", "--steps", "1", *arguments])
    demo.main()
    assert capsys.readouterr().out.splitlines()[-1] == str(demo.OUTPUT)
    assert Image.open(demo.OUTPUT).width > (600 if arguments else 1200)


def test_published_models_are_drawn_by_a_server_that_finds_them(
    server, models, tmp_path, monkeypatch, capsys
):
    """On stand-ins of the same names, by the server that runs already."""
    started = []

    @contextmanager
    def running(base, host, arguments, **options):
        (input_,) = (base / "input").iterdir()
        paths = json.loads(Path(arguments[-1]).read_text("utf-8"))["demo"]
        started.append((input_.name, arguments[-2], paths["base_path"], options["threads"]))
        yield server

    monkeypatch.setattr(demo, "Server", running)
    out = tmp_path / "a folder" / "sheet.png"
    given = ["--models", str(models / "models"), "--steps", "1", "--size", "64", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["demo", *given])
    demo.main()
    assert started == [
        ("reference.png", "--extra-model-paths-config", str(models / "models"), None)
    ]
    *_, told, last = capsys.readouterr().out.splitlines()
    assert last == str(out) and told.startswith("5 images in ")
    assert Image.open(out).width > 1200


@pytest.mark.nightly
def test_comfyui_and_diffusers_draw_the_same_pictures(host_path):
    """From the same noise and at the same steps: to two 8-bit levels in the mean."""
    asked = demo.miniature_request(seed=3, size=None, steps=None)
    rows = tuple(
        replace(row, renders=row.renders[:1] + row.renders[-1:])
        for row in (asked.rows[0], asked.rows[1], asked.rows[-1])
    )
    ask = replace(asked, rows=rows)
    hosts = demo.render_with_comfyui(host_path, ask, None)
    theirs = importlib.import_module("tools.demo_diffusers").draw(ask, demo.show)
    for one, other in zip(chain(*hosts), chain(*theirs), strict=True):
        apart = np.abs(np.asarray(one, float) - np.asarray(other, float))
        assert apart.mean() < 2, apart.mean()
    first, second = (np.asarray(picture, float) for picture in hosts[0])
    assert np.abs(first - second).mean() > 5  # λ = 0 and λ = 1


def test_no_text_names_the_shape_of_its_reference():
    ask = demo.miniature_request(seed=0, size=None, steps=None)
    for row in ask.rows:
        shown = scenes(assemble.SHOWN, 1, assemble.REFERENCES[row.file]).captions[0]
        assert shown not in {render.text for render in row.renders}


def test_steps_that_comfyui_would_count_otherwise_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--steps", "30"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "ddim_uniform would draw 31" in capsys.readouterr().err


def test_steps_are_counted_as_comfyui_counts_them(pack):
    from comfy.model_sampling import EPS, ModelSamplingDiscrete
    from comfy.samplers import ddim_scheduler

    class Sampling(ModelSamplingDiscrete, EPS):
        pass

    for asked in (1, 3, 7, 20, 30, 50, 333, 600, 1000):
        assert demo.drawn_steps(asked) == len(ddim_scheduler(Sampling(), asked)) - 1, asked
