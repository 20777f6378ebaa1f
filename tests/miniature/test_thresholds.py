"""What is demanded of an evaluation, and the command, which fails where a demand is missed."""

from __future__ import annotations

import contextlib
import copy
import json
import sys

import pytest

from miniature import evaluate, files
from miniature.scenes import KINDS
from miniature.thresholds import Demand, demands


def under(prefix, *rows):
    return [(f"{prefix}/{path}", *rest) for path, *rest in rows]


OVER = "decoupled attention over concatenation"
CLOSER = "fine-grained is closer to what is asked than base"
STRANGER = "like each of the two more than a stranger"
PRESETS = ("uniform", "weaker", "style", "composition")
LEAVES = "style leaves the reference's"
# A figure and a good value; where something is demanded of it, a value that is not good enough,
# some by exactly nothing, and what that misses.
FIGURES = [
    ("colour_follows", 0.95, 0.899, "colour follows the reference at λ = 1"),
    ("background_follows", 0.99, 0.899, "background follows the reference at λ = 1"),
    ("texture_follows", 0.85, 0.799, "texture follows the reference at λ = 1"),
    ("shape_kept", 0.9, 0.849, "the text's shape is kept at λ = 1"),
    ("colour_at_zero", 0.12, 0.3, "colour is at chance at λ = 0"),
    ("background_at_zero", 0.2, 0.1, "background is at chance at λ = 0"),
    ("texture_at_zero", 0.25, 0.4, "texture is at chance at λ = 0"),
    ("chance/colour", {"mean": 0.13, "low": 0.07, "high": 0.19}),
    ("chance/background", {"mean": 0.2, "low": 0.14, "high": 0.26}),
    ("chance/texture", {"mean": 0.26, "low": 0.2, "high": 0.32}),
    ("image_similarity/0", 0.05, 0.4, "likeness rises from λ = 0 to 0.5"),
    ("image_similarity/0.5", 0.4),
    ("image_similarity/1", 0.7, 0.4, "likeness rises from λ = 0.5 to 1"),
    ("image_only/colour", 0.95, 0.5, "colour follows the image alone"),
    ("image_only/background", 1.0, 0.5, "background follows the image alone"),
    ("image_only/texture", 0.9, 0.5, "texture follows the image alone"),
    ("image_only/shape_of_reference", 0.7, 0.3, "shape follows the image alone"),
    ("fine_grained_over_base", 0.02, 0.0, "fine-grained is more like what is asked than base"),
    ("decoupled_over_concatenated", 0.1, 0.0, f"{OVER}: likeness"),
    ("concatenated/shape", 0.7, 0.9, f"{OVER}: the text's shape is kept"),
]
for kind in KINDS:
    knows = f"the classifier knows {kind}"
    FIGURES += [
        (f"judge_accuracy/{kind}", 0.995, 0.9, knows),
        (f"judge_accuracy_outlined/{kind}", 0.97, 0.9, f"{knows} of outlined shapes"),
    ]
SETS = [
    *under(
        "several_references/concat",
        ("colour_of_either", 0.9, 0.5, "concat: colour of either"),
        ("background_of_either", 0.95, 0.5, "concat: background of either"),
        ("image_similarity", [0.6, 0.3]),
        ("image_similarity_of_strangers", 0.1, 0.3, f"concat: {STRANGER}"),
    ),
    *under(
        "several_references/average",
        ("image_similarity", [0.5, 0.55]),
        ("image_similarity_of_strangers", 0.1, 0.5, f"average: {STRANGER}"),
    ),
    *under(
        "several_references/per_latent",
        ("colour_of_own", 0.95, 0.5, "one per latent: colour of its own"),
        ("colour_of_other", 0.0, 0.5, "one per latent: colour of the other"),
        ("background_of_own", 1.0, 0.5, "one per latent: background of its own"),
        ("background_of_other", 0.0, 0.5, "one per latent: background of the other"),
    ),
    *under(
        "structure",
        ("overlap", 0.8),
        ("overlap_without", 0.3, 0.75, "edges and image: shapes lie on the edges"),
        ("colour", 0.95, 0.5, "edges and image: colour of the image"),
        ("background", 0.95, 0.5, "edges and image: background of the image"),
        ("image_to_image/overlap", 0.6),
        ("image_to_image/overlap_without", 0.3),
        ("image_to_image/colour", 0.5, 0.15, "image to image: the prompt brings its colour"),
        ("image_to_image/colour_without", 0.1),
    ),
    *under(
        "another_base",
        ("colour", 0.9, 0.5, "another base: colour"),
        ("background", 0.95, 0.5, "another base: background"),
        ("shape_kept", 0.9, 0.5, "another base: shape_kept"),
        ("whiteness_of_outlines", 0.6, 0.25, "another base: its outlines are whiter"),
        ("whiteness_on_the_first_base", 0.2),
    ),
    *under(
        "toolbox/regions",
        ("colour_of_inner", 0.9, 0.5, "regions: colour of its own"),
        ("colour_of_outer", 0.05, 0.5, "regions: colour of the other"),
        ("background_of_inner", 0.1, 0.4, "regions: background of the other"),
        ("background_of_outer", 0.9, 0.5, "regions: background of its own"),
    ),
    *under(
        "toolbox/style",
        ("uniform/texture", 0.95),
        ("uniform/displacement", 3),
        ("uniform/background", 1.0, 0.45, f"{LEAVES} background more than uniform weights"),
        ("weaker/texture", 0.9),
        ("weaker/displacement", 3),
        ("weaker/background", 0.9, 0.45, f"{LEAVES} background more than half of them"),
        ("style/texture", 0.9, 0.5, "style brings the texture"),
        ("style/background", 0.4),
        ("style/displacement", 5),
        ("composition/texture", 0.3, 0.9, "style brings the texture more than composition"),
        ("composition/background", 0.7),
        ("composition/displacement", 3),
    ),
    *[(f"toolbox/style/{preset}/colour", 0.9) for preset in PRESETS],
    *[(f"toolbox/style/{preset}/shape", 0.3) for preset in PRESETS],
    ("toolbox/attention_map/inside", 0.4),
    ("toolbox/attention_map/outside", 0.01, 0.3, "the map is twice as warm inside the mask"),
]
for setting in ("text_and_image", "image_only"):
    closer, over = f"{CLOSER}, {setting}, in", f"{OVER}, {setting}:"
    SETS += [
        *under(
            f"variants/base/{setting}",
            ("distance", 20),
            ("displacement", 6),
            ("image_similarity", 0.7),
            ("shade_error", 7),
            ("seen", 0.97, 0.5, f"base draws a shape, {setting}"),
        ),
        *under(
            f"variants/fine_grained/{setting}",
            ("distance", 15, 20, f"{closer} levels"),
            ("displacement", 3, 6, f"{closer} pixels of displacement"),
            ("image_similarity", 0.72),
            ("shade_error", 5),
            ("seen", 0.97, 0.5, f"fine-grained draws a shape, {setting}"),
        ),
        *under(
            f"variants/concatenated/{setting}",
            ("distance", 30, 20, f"{over} closer to it, in levels"),
            ("displacement", 8),
            ("image_similarity", 0.3, 0.7, f"{over} likeness to what is asked"),
            ("shade_error", 10),
            ("seen", 0.97),
        ),
    ]


def placed(figures):
    """Nest the good values as an evaluation does."""
    whole: dict = {}
    for path, value, *_ in figures:
        place = whole
        *way, last = path.split("/")
        for key in way:
            place = place.setdefault(key, {})
        place[last] = value
    return whole


GOOD = placed(FIGURES) | {"findings": {"sets": [{"seed": 1, **placed(SETS)}]}}
BROKEN = [(path, *rest) for path, _, *rest in FIGURES if rest]
BROKEN += [(path, rest[0], f"set 1: {rest[1]}") for path, _, *rest in SETS if rest]
BROKEN += [("toolbox/style/style/displacement", 3.4, f"{LEAVES} place more than uniform weights")]


def place_of(made, path):
    """Where a figure lies, in an evaluation or in its set, and the last of its names."""
    *way, last = names = path.split("/")
    place = made if names[0] in made else made["findings"]["sets"][0]
    for key in way:
        place = place[key]
    assert last in place, path
    return place, last


def broken(path, value):
    """The good figures, with another value of one."""
    made = copy.deepcopy(GOOD)
    place, last = place_of(made, path)
    place[last] = value
    return made


def missed(figures):
    return [demand for demand in demands(figures) if not demand.met]


def test_good_figures_meet_every_demand():
    asked = [*demands(GOOD)]
    assert all(demand.met for demand in asked), [str(d) for d in asked if not d.met]
    assert len({demand.name for demand in asked}) == len(asked) > 40


@pytest.mark.parametrize(("path", "value", "name"), BROKEN)
def test_a_figure_that_is_not_good_is_missed_and_told(path, value, name):
    (told,) = missed(broken(path, value))
    assert told.name == name
    assert str(told).startswith(f"MISS {name}: ")
    assert any(sign in str(told) for sign in "≥≤>")


def test_every_demand_can_be_missed():
    assert {name for *_, name in BROKEN} == {demand.name for demand in demands(GOOD)}


def test_findings_that_were_not_measured_are_missed():
    few = {key: value for key, value in GOOD.items() if key != "findings"}
    assert [demand.name for demand in missed(few)] == ["findings"]


def test_nothing_that_is_not_a_number_passes():
    assert not Demand("displacement of shapes that none sees", float("nan"), 0).met


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command with `figures` in place of what a server draws; keeps what it wrote."""
    monkeypatch.setattr(evaluate.assemble, "ensure", lambda: tmp_path)
    monkeypatch.setattr(evaluate.install, "require", lambda: tmp_path)
    monkeypatch.setattr(evaluate, "Server", lambda *_, **__: contextlib.nullcontext())
    out = tmp_path / "a folder" / "figures.json"
    arguments = ["--seeds", "2", "--no-figures", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])

    def run(figures):
        whole = {key: value for key, value in figures.items() if key != "findings"}
        (one,) = figures["findings"]["sets"]
        monkeypatch.setattr(evaluate, "run", lambda *_: (whole, {}, None))
        monkeypatch.setattr(evaluate, "experiment", lambda _, count, seed: {**one, "seed": seed})
        try:
            evaluate.main()
        finally:
            run.written = json.loads(out.read_text("utf-8"))

    return run


def test_good_figures_are_written_and_told(run, capsys):
    run(GOOD)
    assert [one["seed"] for one in run.written["findings"]["sets"]] == [1, 2]
    assert run.written["build"] == files.checksums() and run.written["made"] == files.made()
    assert "MISS" not in capsys.readouterr().out


def test_a_missed_demand_fails_and_the_figures_are_kept(run, capsys):
    with pytest.raises(SystemExit) as failed:
        run(broken("colour_follows", 0.5))
    assert failed.value.code
    assert "MISS colour follows" in capsys.readouterr().out
    assert run.written["colour_follows"] == 0.5
