"""The set of drawings: who drew what, what is held out, and which drawing refers to which."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.drawings import packages_of_drawings
from training.data.image import open_image
from training.recipes.emoji import drawings

pytest.importorskip("resvg_py", reason="`pip install resvg-py`")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return packages_of_drawings(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def made(packages, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    drawings.write(out, packages, size=32)
    return out


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def of(file_name):
    hand, subject = file_name.removesuffix(".png").split("/")
    return subject, hand


def test_what_refers_to_what(made):
    plain, style, content = (rows(made, name) for name in ("plain", "style", "content"))
    assert len(plain) == len(style) == len(content) > 100
    for row in style:
        subject, hand = of(row["reference_file_name"])
        assert hand == row["hand"] and subject != row["subject"]
    for row in content:
        subject, hand = of(row["reference_file_name"])
        assert hand != row["hand"] and subject == row["subject"]
    assert all(row["text"] == row["subject"].replace("-", " ") for row in plain)
    trained = {(row["subject"], row["hand"]) for row in plain}
    assert {(row["subject"], row["hand"]) for row in (*style, *content)} == trained
    assert {of(row["reference_file_name"]) for row in (*style, *content)} <= trained
    assert drawings.HELD_OUT_HAND not in {hand for _, hand in trained}


def test_what_is_held_out(made):
    """Whole subjects, a hand, and drawings whose subject and hand are known otherwise."""
    trained = {(row["subject"], row["hand"]) for row in rows(made, "plain")}
    subjects, hands = map(set, zip(*trained, strict=True))
    held = rows(made, "held_out")
    assert not {(row["subject"], row["hand"]) for row in held} & trained
    why = {why: [row for row in held if row["held_out"] == why] for why in ("subject", "drawing")}
    assert why["subject"] and not {row["subject"] for row in why["subject"]} & subjects
    assert why["drawing"] and {row["subject"] for row in why["drawing"]} <= subjects
    assert {row["hand"] for rows_of in why.values() for row in rows_of} <= hands
    rest = {row["hand"] for row in held if row["held_out"] == "hand"}
    assert rest == {drawings.HELD_OUT_HAND}
    assert {row["subject"] for row in held if row["held_out"] == "hand"} & subjects


def test_what_counts_once_or_not_at_all(made):
    """Aliases and what looks the same once, other skins not at all."""
    subjects = {row["subject"] for name in ("plain", "held_out") for row in rows(made, name)}
    assert "person-medium-dark" not in subjects
    assert len(subjects & {"again", "thing-07"}) == 1
    assert len(subjects & {"called-otherwise", "thing-00"}) == 1


def test_pictures_are_square_and_transparent(made):
    with Image.open(made / "pictures" / "noto" / "wide.png") as image:
        assert image.size == (32, 32) and image.mode == "RGBA"
        alpha = np.asarray(image)[..., 3]
    assert alpha[16].min() == 255 and alpha[0].max() == 0 and alpha[31].max() == 0
    pixels = np.asarray(open_image(made / "pictures" / "noto" / "wide.png"))
    assert (pixels[0] == 255).all() and (pixels[16] == [255, 0, 0]).all()


def test_the_same_seed_makes_the_same_set(made, packages, tmp_path):
    for seed, same in ((0, True), (1, False)):
        drawings.write(tmp_path / str(seed), packages, size=32, seed=seed)
        for name in ("style", "held_out"):
            found = (tmp_path / str(seed) / f"{name}.jsonl").read_bytes()
            assert (found == (made / f"{name}.jsonl").read_bytes()) is same
    drawings.write(tmp_path / "few", packages, size=32, most=12)
    assert len({row["subject"] for row in rows(tmp_path / "few", "plain")}) <= 12


def test_a_package_that_cannot_be_brought(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"npm did not bring @iconify-json/noto.*Install Node\.js"):
        drawings.fetch(tmp_path)


def test_everybody_is_named(made):
    told = (made / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for hand in drawings.HANDS:
        assert hand.author in told and hand.licence in told and hand.package in told


@pytest.fixture(scope="module")
def pictures(made):
    from training.recipes.emoji.pictures import Pictures

    return Pictures(made, taught=20)


def test_drawings_in_memory(pictures):
    """Every drawing once, with its subject, hand and split, on white."""
    held = [pictures.held_out_for(why) for why in ("subject", "drawing", "hand")]
    assert torch.equal(torch.cat([pictures.trained, *held]).sort().values, pictures.every)
    row = int(pictures.trained[5])
    told = pictures.rows[row]
    assert pictures.subjects[int(pictures.subject[row])] == told["subject"]
    assert pictures.hands[int(pictures.hand[row])] == told["hand"]
    assert pictures.images(pictures.every[:4]).amax() == 1
    _, of_hands = pictures.labels("hands")
    learnt = {pictures.rows[int(n)]["subject"] for n in of_hands}
    held = {pictures.rows[int(n)]["subject"] for n in pictures.held_out_for("subject")}
    assert held and not learnt & held
    assert learnt | held == set(pictures.subjects)
    assert {int(pictures.hand[n]) for n in of_hands} == set(range(len(drawings.HANDS)))


def test_what_is_measured_of_samples(pictures):
    """References themselves are of their hand, and copies; others' texts are not in them."""
    from training.recipes.emoji import measure

    taught = pictures.taught_subject
    judges = {
        "hands": lambda x: torch.nn.functional.one_hot(by_pixels(x, pictures.hand), 7),
        "subjects": lambda x: torch.nn.functional.one_hot(by_pixels(x, taught).clamp(0), 99),
    }

    def by_pixels(images, labels):
        known = pictures.images(pictures.every).flatten(1)
        return labels[torch.cdist(images.flatten(1), known).argmin(1)]

    cases, strange = measure.chosen(pictures, 3)
    other = pictures.hands.index(drawings.HELD_OUT_HAND)
    assert (pictures.hand[strange.references] == other).all()
    assert (pictures.hand[cases.references] != other).all()
    trained = {pictures.rows[int(n)]["subject"] for n in pictures.trained}
    assert not {pictures.rows[int(n)]["subject"] for n in cases.references} & trained
    assert {pictures.taught[int(s)] for s in cases.subjects} <= trained

    def pictured(numbers):
        return [measure._picture(pictures.pixels[int(n)]) for n in numbers]

    found = measure.scores(pictures, judges, cases, pictured(cases.references))
    assert found["hand"] == 1 and found["subject"] == 0 and found["palette_distance"] == 0
    copied = measure.scores(
        pictures, judges, cases, pictured(pictures.trained[: len(cases.hidden)])
    )
    assert copied["distance_to_the_nearest"] < 0.5 < found["distance_to_the_nearest"]
    whole = measure.of_drawings(pictures, judges, SimpleNamespace(decoded=lambda images: images))
    assert whole["hand"] == whole["hand_decoded"] == 1
    assert whole["subject"] > 0.9 and whole["distance_decoded"] == 0
    untaught = pictures.trained[pictures.taught_subject[pictures.trained] < 0][:1]
    told = measure.scores(pictures, judges, cases[:1], pictured(untaught))
    assert told["distance_to_the_nearest"] < 0.5  # a copy of what only references show
    own = measure.palettes(pictures, strange.references, pictured(strange.references))
    assert own["palette_distance"] == 0


def test_no_text_names_what_its_reference_shows(pictures):
    from training.recipes.emoji import measure

    for each in range(1, 11):
        for cases in measure.chosen(pictures, each):
            own = pictures.taught_subject[cases.references]
            assert not (own == cases.subjects).any()


def test_drawings_that_no_training_saw(pictures):
    """Half of the texts name one; a sample that is it is told from one that is another hand's."""
    from training.recipes.emoji import measure

    cases, _ = measure.chosen(pictures, 3)
    alike = [n for n, subject in enumerate(pictures.taught) if subject == "wide"]  # by all hands
    hidden = cases[cases.hidden & ~torch.isin(cases.subjects, torch.tensor(alike).long())]
    assert 0 < len(hidden.references) < len(cases.references)
    assert (pictures.hand[hidden.withheld] == pictures.hand[hidden.references]).all()
    assert (pictures.taught_subject[hidden.withheld] == hidden.subjects).all()
    assert torch.isin(hidden.withheld, pictures.held_out_for("drawing")).all()
    judges = {name: lambda x: torch.zeros(len(x), 9) for name in ("hands", "subjects")}
    drawn = [measure._picture(pictures.pixels[int(n)]) for n in hidden.withheld]
    name = "nearer_to_the_withheld_drawing_than_to_any_known"
    assert measure.scores(pictures, judges, hidden, drawn)[name] == 1
    taught = pictures.of_taught(pictures.trained)
    known = [measure._picture(pictures.pixels[int(n)]) for n in taught[: len(drawn)]]
    assert measure.scores(pictures, judges, hidden, known)[name] == 0


def test_subjects_at_equal_hands():
    """Where each adapter first takes as many hands as the weaker one at its best."""
    from training.recipes.emoji import measure

    def sweep(*points):
        by_scale = {str(n): {"hand": h, "subject": s} for n, (h, s) in enumerate(points)}
        return {"by_scale": by_scale}

    found = measure.at_equal_hand(
        {"plain": sweep((0.1, 1.0), (0.5, 0.8), (0.9, 0.2)), "style": sweep((0.2, 1.0), (0.7, 0.9))}
    )
    assert found == {"hand": 0.7, "plain": pytest.approx(0.5), "style": pytest.approx(0.9)}


def test_steps_that_there_are_none_of(monkeypatch, capsys):
    import training.recipes.emoji.__main__ as recipe

    monkeypatch.setattr("sys.argv", ["emoji", "--steps", '{"adapters": 3}'])
    with pytest.raises(SystemExit):
        recipe.main()
    assert "--steps names adapters; expected some of subjects" in capsys.readouterr().err


def test_a_judge_learns_and_is_loaded(tmp_path):
    from miniature import files
    from training.recipes.emoji import judges

    colors = torch.eye(3)[:, :, None, None].expand(3, 3, 64, 64)

    def draw(step):
        labels = torch.arange(12) % 3
        return colors[labels], labels

    made = judges.train("colors", 0, 30, draw, 3)
    files.save(tmp_path / "judge.safetensors", files.halved(made.state_dict()))
    judge = judges.load(tmp_path / "judge.safetensors")
    assert judge(judges.blurred(colors)).argmax(1).tolist() == [0, 1, 2]
