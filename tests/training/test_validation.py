"""Contact sheets and curves of a training run, and that they leave the run as it was."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ip_adapter_core.contact_sheet import Layout
from tests.support import image_folders
from tests.support import small_models as small
from training import validation as validation_module
from training.config import ValidationConfig
from training.errors import TrainingError
from training.evaluation.clip_score import clip_i, clip_t, load_clip
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder
from training.sampling import Prompts, Sampler, SamplingOptions, encode_images, encode_text
from training.unet import attach
from training.validation import SEED, Validation

LAYOUT = Layout()
CELL, GAP, LINE, MARGIN = LAYOUT.cell[0], LAYOUT.gap, LAYOUT.line, LAYOUT.margin
TOP = 3 * LINE  # of the rows: title, headings and scores stand above
KIND = "image_embeds"
PROMPTS = ("", "a very long " + "and longer " * 60 + "text")
WEIGHTS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    small.base(path / "base", "sd15", levels=2)
    small.image_encoder(path / "encoder")
    small.clip(path / "clip")
    for seed in range(2):
        image_folders.image(seed, (32, 64)).save(path / f"{seed}.png")  # fits a cell in height
    return path


@pytest.fixture(scope="module")
def base(folder):
    base = load_base(str(folder / "base"))
    attach(base.unet)
    return base


@pytest.fixture(scope="module")
def encoder(folder):
    return ImageEncoder.from_name(str(folder / "encoder"))


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(str(folder / "clip"), torch.device("cpu"))


@pytest.fixture(scope="module")
def references(folder):
    return [Image.open(folder / f"{seed}.png").convert("RGB") for seed in range(2)]


@pytest.fixture(scope="module")
def settings(folder):
    return ValidationConfig(
        validation_image=(str(folder / "0.png"), str(folder / "1.png")),
        validation_prompt=PROMPTS,
        validation_scale=WEIGHTS,
        validation_num_inference_steps=3,
        validation_guidance_scale=3.0,
    )


@pytest.fixture
def few(settings):
    """Settings for one row of two pictures."""
    return dataclasses.replace(
        settings,
        validation_image=settings.validation_image[:1],
        validation_prompt=("text",),
        validation_scale=(0.0, 1.0),
    )


@pytest.fixture
def validation(few, base, encoder, clip, tmp_path):
    return Validation(few, base, encoder, KIND, tmp_path / "validation", clip)


@pytest.fixture
def accelerator(accelerate_anew):
    return Accelerator(cpu=True)


@pytest.fixture
def adapter():
    return small.adapter("sd15", "base")


@pytest.fixture(scope="module")
def shown(settings, base, encoder, clip, tmp_path_factory):
    """What a validation at step 500 gave: its values, sheet and log."""
    out = tmp_path_factory.mktemp("shown")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=out / "logs")
    accelerator.init_trackers("run")
    validation = Validation(settings, base, encoder, KIND, out / "validation", clip)
    values = validation(accelerator, small.adapter("sd15", "base"), 500)
    accelerator.end_training()
    assert [path.name for path in (out / "validation").iterdir()] == ["step-000500.png"]
    sheet = Image.open(out / "validation" / "step-000500.png")
    log = EventAccumulator(str(out / "logs" / "run")).Reload()
    return SimpleNamespace(values=values, sheet=np.asarray(sheet), log=log)


@pytest.fixture(scope="module")
def alone(settings, base, encoder, references):
    """Each picture of the sheet, drawn for itself."""

    def draw(reference, prompt, weight):
        features, zero = encode_images(encoder, [reference], KIND)
        asked = Prompts(encode_text(base, [prompt]), features, zero, [weight], [SEED])
        return Sampler(base, SamplingOptions(steps=3, guidance=3.0)).draw(
            small.adapter("sd15", "base"), asked
        )[0]

    cells = itertools.product(range(len(references)), PROMPTS, WEIGHTS)
    return {(n, prompt, weight): draw(references[n], prompt, weight) for n, prompt, weight in cells}


def cell(sheet, row, column, top=TOP):
    left = MARGIN + column * (CELL + GAP)
    top += row * (LINE + CELL + GAP) + LINE
    return sheet[top : top + CELL, left : left + CELL]


def test_the_sheet_holds_what_it_says(shown, alone, references):
    for row, (number, prompt) in enumerate(itertools.product(range(2), PROMPTS)):
        large = references[number].resize((CELL // 2, CELL), Image.Resampling.LANCZOS)
        reference = cell(shown.sheet, row, 0)[:, CELL // 4 : CELL * 3 // 4]
        assert np.array_equal(reference, large)
        for column, weight in enumerate(WEIGHTS):
            drawn = alone[number, prompt, weight].resize((CELL, CELL), Image.Resampling.LANCZOS)
            large = np.asarray(drawn).astype(int)
            assert abs(cell(shown.sheet, row, column + 1) - large).max() <= 2
    assert not np.array_equal(cell(shown.sheet, 0, 1), cell(shown.sheet, 0, 3)), "no effect of λ"


def test_labels_stay_within_the_sheet(shown):
    """The margins are bare, whatever the length of a prompt, and each label is there."""
    paper = shown.sheet[0, 0]
    assert (shown.sheet[:, -MARGIN + 1 :] == paper).all()
    for row in range(4):
        top = TOP + row * (LINE + CELL + GAP)
        assert (shown.sheet[top : top + LINE] != paper).any()
    for column in range(4):
        left = MARGIN + column * (CELL + GAP)
        assert (shown.sheet[LINE:TOP, left : left + CELL] != paper).any()


def test_curves(shown, alone, clip, references):
    for weight in WEIGHTS:
        like, true = [], []
        for number, prompt in itertools.product(range(2), PROMPTS):
            drawn = clip.images([alone[number, prompt, weight]])
            like.append(float(clip_i(drawn, clip.images([references[number]]))))
            if prompt:
                true.append(float(clip_t(drawn, clip.texts([prompt]))))
        for name, scores in (("clip_i", like), ("clip_t", true)):
            found = shown.values[f"validation/{name}/weight_{weight:g}"]
            assert found == pytest.approx(np.mean(scores), abs=2e-3)
    assert set(shown.log.Tags()["scalars"]) == set(shown.values)
    assert shown.log.Scalars("validation/clip_i/weight_0.5")[0].step == 500
    image = shown.log.Images("validation")[0]
    assert (image.step, image.height, image.width) == (500, *shown.sheet.shape[:2])


def test_wandb_is_given_the_sheet(validation, adapter, accelerator):
    given = []
    accelerator.trackers = [
        SimpleNamespace(
            name="wandb",
            log=lambda values, **_: None,
            log_images=lambda values, step: given.append((values["validation"][0], step)),
        )
    ]
    validation(accelerator, adapter, 7)
    ((sheet, step),) = given
    assert step == 7 and isinstance(sheet, Image.Image)


def test_without_a_scoring_model(few, base, encoder, adapter, accelerator, tmp_path):
    validation = Validation(few, base, encoder, KIND, tmp_path / "out")
    assert validation(accelerator, adapter, 1) == {}
    assert (tmp_path / "out" / "step-000001.png").exists()


def test_random_state_is_untouched(validation, accelerator, adapter, monkeypatch):
    """Even by models that draw random numbers."""
    draw = validation._sampler.draw

    def numbers():
        return [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()]

    def seed():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    monkeypatch.setattr(validation._sampler, "draw", lambda *given: numbers() and draw(*given))
    seed()
    expected = numbers()
    seed()
    validation(accelerator, adapter, 1)
    assert numbers() == expected


def test_missing_references_are_named_at_the_start(settings, base, encoder, tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG")
    wrong = ("nowhere/a.png", settings.validation_image[0], str(tmp_path / "damaged.png"))
    changed = dataclasses.replace(settings, validation_image=wrong)
    with pytest.raises(TrainingError, match=r"2 of 3 .*nowhere/a.png.*no such file.*damaged.png"):
        Validation(changed, base, encoder, KIND, tmp_path / "out")


@pytest.mark.parametrize("name", ["validation_image", "validation_prompt", "validation_scale"])
def test_nothing_to_draw(settings, base, encoder, tmp_path, name):
    changed = dataclasses.replace(settings, **{name: ()})
    with pytest.raises(TrainingError, match=f"{name} is empty"):
        Validation(changed, base, encoder, KIND, tmp_path / "out")


def test_a_folder_that_cannot_be(few, base, encoder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"Nothing can be written to .*file/out"):
        Validation(few, base, encoder, KIND, tmp_path / "file" / "out")


def test_a_full_disk_does_not_end_the_training(
    validation, accelerator, adapter, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    validation(accelerator, adapter, 1)
    assert "No space left on device" in caplog.text
    assert not [*(tmp_path / "validation").iterdir()]


def test_a_diverged_adapter_does_not_end_the_training(
    validation, accelerator, adapter, tmp_path, caplog
):
    adapter.image_proj.proj.weight[0, 0] = float("nan")
    assert validation(accelerator, adapter, 1) == {}
    assert "diverged" in caplog.text
    sheet = np.asarray(Image.open(tmp_path / "validation" / "step-000001.png"))
    assert len(np.unique(cell(sheet, 0, 1, 2 * LINE).reshape(-1, 3), axis=0)) == 1


@pytest.mark.nightly
def test_two_processes_draw_what_one_draws(
    settings, base, encoder, clip, adapter, tmp_path, two_ranks, monkeypatch
):
    monkeypatch.setattr(validation_module, "BATCH", 1)
    given = dataclasses.replace(settings, validation_image=settings.validation_image[:1])

    def draw(out):
        accelerator = Accelerator(cpu=True)
        clip.batch = 1
        values = Validation(given, base, encoder, KIND, out, clip)(accelerator, adapter, 1)
        (out / f"values-{accelerator.process_index}.json").write_text(json.dumps(values))
        accelerator.end_training()  # a group that is still there can abort a process that ends

    one, two = tmp_path / "one", tmp_path / "two"
    two_ranks(draw, two)
    draw(one)
    assert (one / "step-000001.png").read_bytes() == (two / "step-000001.png").read_bytes()
    for rank in range(2):
        found = (two / f"values-{rank}.json").read_text()
        assert found == (one / "values-0.json").read_text()
