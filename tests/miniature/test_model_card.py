"""The card's measured section: what the evaluation says, between the marks, and nothing else."""

from __future__ import annotations

import copy
import json
import sys

import pytest

from miniature import files
from miniature import model_card as card
from miniature.scenes import KINDS
from miniature.thresholds import demands
from tests.miniature.test_thresholds import GOOD

EVALUATION = {
    **copy.deepcopy(GOOD),
    "references": 64,
    "seed": 0,
    "pictures_at_zero": 256,
    "shape_at_zero": 0.97,
    "sampling": {"steps": 20, "guidance": 4.0},
    "intervals": {kind: [0.81, 0.98] for kind in KINDS},
    "by_weight": {w: dict.fromkeys(KINDS, x) for w, x in (("0", 0.1), ("1", 0.913))},
    "image_similarity_of_strangers": 0.031,
    "fine_grained": dict.fromkeys(KINDS, 0.877) | {"similarity_to_asked": 0.922},
    "concatenated": dict.fromkeys(KINDS, 0.7) | {"similarity_to_asked": 0.533},
    "described": dict.fromkeys(KINDS, 0.993),
    "similarity_to_asked": 0.911,
}
EVALUATION["chance"]["shape"] = {"mean": 0.18, "low": 0.1, "high": 0.3}
EVALUATION["image_only"]["image_similarity"] = 0.666
EVALUATION["findings"]["references"] = 24
for one in EVALUATION["findings"]["sets"]:
    one["variants"]["strangers"] = one["variants"]["concatenated"]
    one["several_references"]["average"]["colour_of_either"] = 0.6


def of_seed(number, **changes):
    made = {"recipe": "abc", "seed": number, "minutes": 10 * number, "on": "a machine"}
    found = copy.deepcopy(EVALUATION)
    found["findings"]["sets"] += copy.deepcopy(found["findings"]["sets"])  # two
    return {**found, "made": made, **changes}


def without(found, *path):
    *way, last = path
    place = found
    for key in way:
        place = place[key]
    del place[last]
    return found


def test_the_figures_are_in_it():
    text = card.section(EVALUATION)
    for figure in ("0.91 (0.81 … 0.98)", "0.88", "0.13 (0.07 … 0.19)", "0.05 at 0", "0.03", "0.67"):
        assert figure in text, figure
    assert "Of 64 references" in text and "4 images each" in text
    assert "at λ = 1: 0.91 base, 0.92 fine-grained, 0.53 concatenated." in text
    assert "| … fine-grained | 15.0 |" in text and "| … concatenated | 30.0 |" in text
    assert "are met." in text and "Missed" not in text
    assert "| seed 1 |" not in text


def test_further_builds_lie_beside_the_first():
    other = of_seed(2, shape_kept=0.8765)
    for number, one in enumerate(other["findings"]["sets"]):
        one["variants"]["base"]["text_and_image"]["distance"] = 40.0 + number
    text = card.section(of_seed(1), [other])
    assert "seed 1 in 10 minutes (a machine); seed 2 in 20 minutes (a machine)" in text
    assert "| shape of the text at λ = 1 | 0.90 | 0.88 |" in text
    assert "| distance from what is asked, base adapter | 20.0 | 40.5 |" in text
    met = f"{len([*demands(other)])}"
    assert f"met | {met} of {met} |" in text


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (of_seed(2, made={}), "no 'made': measure"),
        (
            of_seed(2, made={"recipe": "x", "seed": 2, "minutes": 1, "on": ""}),
            "recipes abc, x; expected",
        ),
        (of_seed(1), r"seeds \[1, 1\]; expected"),
        (of_seed(2, references=8), "'references': 64.*'references': 8.*measure one again"),
        (of_seed(2, seed=5), "'seed': 0.*'seed': 5"),
        (of_seed(2, sampling={"steps": 9, "guidance": 4.0}), "'steps': 20.*'steps': 9"),
        (of_seed(2, findings=EVALUATION["findings"] | {"references": 9}), "'findings': 9"),
        (of_seed(2, findings=EVALUATION["findings"] | {"sets": []}), r"'sets': \[\]"),
        (without(of_seed(2), "findings"), "no 'findings'"),
    ],
)
def test_builds_that_cannot_be_compared_are_refused(other, told):
    with pytest.raises(card.NotComparable, match=told):
        card.section(of_seed(1), [other])


def test_every_line_of_a_table_has_as_many_cells():
    text = card.section(EVALUATION) + "\n\n" + card.section(of_seed(1), [of_seed(2), of_seed(3)])
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block


def test_what_is_missed_is_said():
    missed = card.section({**EVALUATION, "colour_follows": 0.5})
    assert "Missed:\n\n- colour follows the reference at λ = 1: 0.500 (≥ 0.9)" in missed


def test_a_figure_that_is_missing_is_no_model_that_is_missing():
    with pytest.raises(KeyError, match="texture_at_zero"):
        card.section(of_seed(1), [without(of_seed(2), "texture_at_zero")])
    few = without(copy.deepcopy(EVALUATION), "findings", "sets", 0, "structure", "overlap")
    with pytest.raises(KeyError):
        card.section(few)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command, on a card and evaluations; the first has to be of the build `abc`."""
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    monkeypatch.setattr(files, "checksums", lambda: {"unet": "abc"})
    (tmp_path / "README.md").write_text(f"{card.BEGIN}{card.END}", encoding="utf-8")

    def run(*evaluations):
        paths = [tmp_path / f"evaluation-{number}.json" for number in range(len(evaluations))]
        for path, evaluation in zip(paths, evaluations, strict=True):
            if evaluation is not None:
                path.write_text(json.dumps(evaluation), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["card", *map(str, paths)])
        card.main()
        return (tmp_path / "README.md").read_text("utf-8")

    return run


def test_the_command_writes_the_card(run):
    first = of_seed(1, build={"unet": "abc"})
    assert "Of 64 references" in run(first)
    assert "| seed 1 | seed 2 |" in run(first, of_seed(2))


@pytest.mark.parametrize(
    ("evaluations", "told"),
    [
        ([None], "is not there"),
        ([of_seed(1, build={"unet": "xyz"})], "measured other files"),
        ([of_seed(1, build={"unet": "abc"}), of_seed(1)], "seeds [1, 1]"),
    ],
)
def test_the_command_tells_what_cannot_be(run, capsys, evaluations, told):
    with pytest.raises(SystemExit):
        run(*evaluations)
    assert told in capsys.readouterr().err


def test_only_what_lies_between_the_marks_changes(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{card.BEGIN}\nstale\n{card.END}\n\nafter\n", encoding="utf-8")
    card.write(EVALUATION, page)
    once = page.read_text("utf-8")
    assert once.startswith(f"before\n\n{card.BEGIN}\n\nOf 64") and "stale" not in once
    assert once.endswith(f"\n\n{card.END}\n\nafter\n")
    card.write(EVALUATION, page)
    assert page.read_text("utf-8") == once


@pytest.mark.parametrize("content", ["no marks", f"{card.END}\n{card.BEGIN}", card.BEGIN])
def test_a_card_without_its_marks_is_left_alone(tmp_path, content):
    page = tmp_path / "README.md"
    page.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="needs one line"):
        card.write(EVALUATION, page)
    assert page.read_text("utf-8") == content


def test_the_shipped_card_has_the_marks():
    page = (files.FOLDER / "README.md").read_text("utf-8")
    assert page.count(card.BEGIN) == page.count(card.END) == 1
