"""Contact sheets and curves of a training run, and that they leave the run as it was."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ip_adapter_core.contact_sheet import Layout
from tests.support import image_folders
from tests.support import small_models as small
from training.config import ValidationConfig
from training.errors import TrainingError
from training.evaluation.clip_score import clip_i, clip_t, load_clip
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder
from training.sampling import Prompts, Sampler, SamplingOptions, encode_images, encode_text
from training.unet import attach
from training.validation import SEED, Validation

ROOT = Path(__file__).resolve().parents[2]
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
def adapter():
    return small.adapter("sd15", "base")


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
def accelerator(tmp_path):
    made = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "logs")
    made.init_trackers("run")
    return made


@pytest.fixture
def validation(settings, base, encoder, clip, tmp_path):
    return Validation(settings, base, encoder, KIND, tmp_path / "validation", clip)


def cell(sheet, row, column, top=TOP):
    left = MARGIN + column * (CELL + GAP)
    top += row * (LINE + CELL + GAP) + LINE
    return np.asarray(sheet)[top : top + CELL, left : left + CELL]


def alone(settings, base, encoder, adapter, reference, prompt, weight):
    """One picture of the sheet, drawn for itself."""
    picture = Image.open(settings.validation_image[reference])
    features, zero = encode_images(encoder, [picture], KIND)
    asked = Prompts(encode_text(base, [prompt]), features, zero, [weight], [SEED])
    return Sampler(base, SamplingOptions(steps=3, guidance=3.0)).draw(adapter, asked)[0]


def test_the_sheet_holds_what_it_says(
    settings, base, encoder, adapter, validation, accelerator, tmp_path
):
    validation(accelerator, adapter, 500)
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["step-000500.png"]
    sheet = Image.open(tmp_path / "validation" / "step-000500.png")
    rows = [(reference, prompt) for reference in range(2) for prompt in PROMPTS]
    for row, (reference, prompt) in enumerate(rows):
        shown = Image.open(settings.validation_image[reference]).convert("RGB")
        large = shown.resize((CELL // 2, CELL), Image.Resampling.LANCZOS)
        assert np.array_equal(cell(sheet, row, 0)[:, CELL // 4 : CELL * 3 // 4], large)
        for column, weight in enumerate(WEIGHTS):
            drawn = alone(settings, base, encoder, adapter, reference, prompt, weight)
            large = np.asarray(drawn.resize((CELL, CELL), Image.Resampling.LANCZOS)).astype(int)
            assert abs(cell(sheet, row, column + 1) - large).max() <= 2
    assert not np.array_equal(cell(sheet, 0, 1), cell(sheet, 0, 3)), "λ shows no effect"


def test_labels_stay_within_the_sheet(validation, accelerator, adapter, tmp_path):
    """The margins are bare, whatever the length of a prompt, and each label is there."""
    validation(accelerator, adapter, 1)
    sheet = np.asarray(Image.open(tmp_path / "validation" / "step-000001.png"))
    paper = sheet[0, 0]
    assert (sheet[:, -MARGIN + 1 :] == paper).all()
    for row in range(4):
        top = TOP + row * (LINE + CELL + GAP)
        assert (sheet[top : top + LINE] != paper).any()
    for column in range(4):
        left = MARGIN + column * (CELL + GAP)
        assert (sheet[LINE:TOP, left : left + CELL] != paper).any()


def test_curves(settings, base, encoder, clip, adapter, validation, accelerator, tmp_path):
    values = validation(accelerator, adapter, 20)
    references = [Image.open(path) for path in settings.validation_image]
    for weight in WEIGHTS:
        like, true = [], []
        for number, reference in enumerate(references):
            for prompt in PROMPTS:
                drawn = clip.images(
                    [alone(settings, base, encoder, adapter, number, prompt, weight)]
                )
                like.append(float(clip_i(drawn, clip.images([reference]))))
                if prompt:
                    true.append(float(clip_t(drawn, clip.texts([prompt]))))
        assert values[f"validation/clip_i/weight_{weight:g}"] == pytest.approx(
            np.mean(like), abs=2e-3
        )
        assert values[f"validation/clip_t/weight_{weight:g}"] == pytest.approx(
            np.mean(true), abs=2e-3
        )
    accelerator.end_training()
    log = EventAccumulator(str(tmp_path / "logs" / "run")).Reload()
    assert set(log.Tags()["scalars"]) == set(values)
    assert log.Scalars("validation/clip_i/weight_0.5")[0].step == 20
    shown = log.Images("validation")[0]
    sheet = Image.open(tmp_path / "validation" / "step-000020.png")
    assert (shown.step, shown.width, shown.height) == (20, *sheet.size)


def test_wandb_is_given_the_sheet(validation, adapter, accelerator):
    given = []

    class Tracker:
        name = "wandb"

        def log(self, values, step=None, **_):
            pass

        def log_images(self, values, step=None):
            given.append((values, step))

    accelerator.trackers = [Tracker()]
    validation(accelerator, adapter, 7)
    ((values, step),) = given
    assert step == 7 and isinstance(values["validation"][0], Image.Image)


def test_without_a_scoring_model(settings, base, encoder, adapter, accelerator, tmp_path):
    validation = Validation(settings, base, encoder, KIND, tmp_path / "out")
    assert validation(accelerator, adapter, 1) == {}
    assert (tmp_path / "out" / "step-000001.png").exists()


def test_random_state_is_untouched(validation, accelerator, adapter, monkeypatch):
    """Even by models that draw random numbers."""
    draw = validation._sampler.draw

    def greedy(*arguments):
        torch.rand(3), random.random(), np.random.rand(3)
        return draw(*arguments)

    monkeypatch.setattr(validation._sampler, "draw", greedy)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(3), random.random(), np.random.rand(3)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    validation(accelerator, adapter, 1)
    found = torch.rand(3), random.random(), np.random.rand(3)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1] and np.array_equal(found[2], expected[2])


def test_training_goes_on_as_before(validation, accelerator, base):
    """Same step with and without a validation before it; mode and gradients stay."""
    adapter = small.adapter("sd15", "base").train().requires_grad_(True)
    optimizer = torch.optim.AdamW(adapter.parameters())

    def step():
        torch.manual_seed(0)
        keys_values = [*adapter.keys_values(adapter.tokens(torch.randn(1, small.EMBED)))]
        given = {"ip_hidden_states": keys_values}
        text = torch.randn(1, 77, small.HIDDEN)
        base.unet(
            torch.randn(1, 4, 8, 8), 5, text, cross_attention_kwargs=given
        ).sample.sum().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    before = step()
    optimizer.zero_grad()
    modes = [module.training for module in (*base.unet.modules(), *adapter.modules())]
    validation(accelerator, adapter, 1)
    assert modes == [module.training for module in (*base.unet.modules(), *adapter.modules())]
    assert all(p.requires_grad and p.grad is None for p in adapter.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, step(), strict=True))


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


def test_a_folder_that_cannot_be(settings, base, encoder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"Nothing can be written to .*file/out"):
        Validation(settings, base, encoder, KIND, tmp_path / "file" / "out")


def test_a_full_disk_does_not_end_the_training(
    validation, accelerator, adapter, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    validation(accelerator, adapter, 1)
    assert "No space left on device" in caplog.text
    assert not [*(tmp_path / "validation").iterdir()]


def test_a_diverged_adapter_does_not_end_the_training(validation, accelerator, tmp_path, caplog):
    adapter = small.adapter("sd15", "base")
    adapter.image_proj.proj.weight[0, 0] = float("nan")
    assert validation(accelerator, adapter, 1) == {}
    assert "diverged" in caplog.text
    sheet = Image.open(tmp_path / "validation" / "step-000001.png")
    assert len(np.unique(cell(sheet, 0, 1, 2 * LINE).reshape(-1, 3), axis=0)) == 1


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.append({root!r})
import torch
from accelerate import Accelerator
from tests.support import small_models as small
from training.models.image_encoder import ImageEncoder
from training.evaluation.clip_score import load_clip
from training.models.base import load_base
from training import validation as module
from training.config import ValidationConfig
from training.unet import attach

torch.set_num_threads(1)
folder, out = Path({folder!r}), Path({out!r})
base = load_base(str(folder / "base"))
attach(base.unet)
module.BATCH = 1
settings = ValidationConfig(
    validation_image=(str(folder / "0.png"),),
    validation_prompt=("", "text"),
    validation_num_inference_steps=2,
    validation_guidance_scale=3.0,
)
encoder = ImageEncoder.from_name(str(folder / "encoder"))
clip = load_clip(str(folder / "clip"), torch.device("cpu"), batch=1)
accelerator = Accelerator(cpu=True)
validation = module.Validation(settings, base, encoder, "image_embeds", out, clip)
values = validation(accelerator, small.adapter("sd15", "base"), 1)
name = f"values-{{accelerator.num_processes}}-{{accelerator.process_index}}.json"
(out / name).write_text(json.dumps(values))
accelerator.end_training()  # a process group that is still there can abort a process that ends
"""


@pytest.mark.nightly
def test_two_processes_draw_what_one_draws(folder, tmp_path):
    for processes in (1, 2):
        script = tmp_path / f"run{processes}.py"
        out = tmp_path / f"out{processes}"
        script.write_text(SCRIPT.format(root=str(ROOT), folder=str(folder), out=str(out)))
        # Not `accelerate launch --cpu --num_processes 2`: that starts one process.
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *launch, str(script)], check=True, env=environment)
    one, two = tmp_path / "out1", tmp_path / "out2"
    assert (one / "step-000001.png").read_bytes() == (two / "step-000001.png").read_bytes()
    expected = (one / "values-1-0.json").read_text()
    assert expected == (two / "values-2-0.json").read_text()
    assert expected == (two / "values-2-1.json").read_text()
