"""The demo's parts (the workflow it posts, the sheet it draws), and all of it on both roads."""

from __future__ import annotations

import json
import sys
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from miniature import setup
from miniature.scenes import scenes
from tools import demo
from tools.ask import Ask, Row, Shot
from tools.sheet import contact_sheet


@pytest.fixture
def row():
    picture = setup.as_image(setup.render(setup.scenes(1, 1))[0])
    return Row("a title", "some.png", picture, (Shot(0.5, "a boat"),))


@pytest.fixture
def ask(row):
    return Ask((row,), "blurred", size=64, steps=3, guidance=5.0, seed=9)


@pytest.fixture
def workflow():
    return json.loads(demo.WORKFLOW.read_text("utf-8"))


def test_the_workflow_gets_the_demos_values_and_stays_itself(workflow, ask, row):
    before = json.dumps(workflow)
    prompt = demo.adjusted(workflow, ask, row, row.shots[0])
    assert json.dumps(workflow) == before
    assert [x["weight"] for x in demo.of_class(prompt, "IPA_Apply")] == [0.5]
    assert [(x["steps"], x["seed"]) for x in demo.of_class(prompt, "KSampler")] == [(3, 9)]
    assert [x["width"] for x in demo.of_class(prompt, "EmptyLatentImage")] == [64]
    assert [x["image"] for x in demo.of_class(prompt, "LoadImage")] == ["some.png"]
    assert demo.texts(prompt) == ("a boat", "blurred")
    assert prompt.keys() == workflow.keys()


def test_with_published_models_the_texts_are_the_workflows(workflow):
    positive, negative = demo.texts(workflow)
    assert positive and negative and positive != negative
    ask = demo.on_published(workflow, 1, None, None)
    assert {shot.text for row in ask.rows for shot in row.shots} == {positive}
    assert (ask.negative, ask.size, ask.steps, ask.guidance) == (negative, 512, 50, 7.5)


def test_the_sheet_shows_every_reference_and_every_picture():
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
    cells = [Image.new("RGB", (80, 60), colour) for colour in colours]
    growing = Row("one", "", cells[0], (Shot(0.0, "a boat"), Shot(1.0, "a boat")))
    told = Row("two", "", cells[1], (Shot(1.0, "a boat"), Shot(1.0, "")))
    sheet = contact_sheet([growing, told], [[cells[2], cells[3]]] * 2, ["a note"])
    shown = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert shown.issuperset(colours)


@pytest.mark.parametrize("arguments", [[], ["--no-host"]], ids=["host", "no host"])
def test_the_demo_draws_its_sheet(request, tmp_path, monkeypatch, capsys, arguments):
    if not arguments:
        request.getfixturevalue("host_path")  # skips where there is none
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "output" / "demo.png")
    monkeypatch.setattr(sys, "argv", ["demo", "--steps", "1", *arguments])
    demo.main()
    assert capsys.readouterr().out.splitlines()[-1] == str(demo.OUTPUT)
    assert Image.open(demo.OUTPUT).width > 1200


def test_comfyui_and_diffusers_draw_the_same_pictures(host_path):
    """From the same noise and at the same steps: to two 8-bit levels in the mean."""
    asked = demo.on_miniature(seed=3, size=None, steps=None)
    rows = tuple(
        Row(row.title, row.file, row.reference, row.shots[:1] + row.shots[-1:])
        for row in (asked.rows[0], asked.rows[1], asked.rows[-1])
    )
    ask = Ask(rows, asked.negative, asked.size, asked.steps, asked.guidance, asked.seed)
    hosts, theirs = demo.with_host(host_path, ask, None), demo.without_host(ask)
    for one, other in zip(chain(*hosts), chain(*theirs), strict=True):
        apart = np.abs(np.asarray(one, float) - np.asarray(other, float))
        assert apart.mean() < 2, apart.mean()
    first, second = (np.asarray(picture, float) for picture in hosts[0])
    assert np.abs(first - second).mean() > 5  # λ = 0 and λ = 1


def test_no_text_names_the_shape_of_its_reference():
    ask = demo.on_miniature(seed=0, size=None, steps=None)
    for row in ask.rows:
        shown = scenes(setup.SHOWN, 1, setup.REFERENCES[row.file]).captions[0]
        assert shown not in {shot.text for shot in row.shots}


def test_steps_that_comfyui_would_count_otherwise_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--steps", "30"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "ddim_uniform would draw 31" in capsys.readouterr().err


def test_the_sheet_goes_where_it_is_asked_to(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a folder" / "sheet.png"
    picture = Image.new("RGB", (64, 64))
    ask = demo.on_miniature(seed=0, size=None, steps=None)
    monkeypatch.setattr(
        demo, "without_host", lambda _: [[picture] * len(r.shots) for r in ask.rows]
    )
    monkeypatch.setattr(sys, "argv", ["demo", "--no-host", "--out", str(out)])
    demo.main()
    assert Image.open(out).width > 1000
    *_, told, last = capsys.readouterr().out.splitlines()
    assert last == str(out) and told.startswith("20 pictures in ")


def test_steps_are_counted_as_comfyui_counts_them(pack):
    from comfy.model_sampling import EPS, ModelSamplingDiscrete
    from comfy.samplers import ddim_scheduler

    class Sampling(ModelSamplingDiscrete, EPS):
        pass

    for asked in (1, 3, 7, 20, 30, 50, 333, 600, 1000):
        assert demo.drawn_steps(asked) == len(ddim_scheduler(Sampling(), asked)) - 1, asked
