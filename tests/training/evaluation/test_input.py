"""What is wrong is told before anything is drawn; what does not belong together is refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import replace as changed
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import image_folders
from tests.support import small_models as small
from training import evaluate as script
from training.config import parse
from training.errors import TrainingError
from training.evaluate import EvaluationConfig, evaluate
from training.sampling import NotFinite

PICTURES = 5  # conftest.py's


def base_times(folder, factor):
    """Save the base with an output that is so many times what it was."""
    pipeline = small.base(folder, "sd15", levels=2)
    pipeline.unet.conv_out.weight.mul_(factor)
    pipeline.save_pretrained(folder)
    return {"pretrained_model_name_or_path": str(folder)}


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_inference_steps", 3),
        ("guidance_scale", 2.0),
        ("num_images_per_prompt", 1),
        ("seed", 5),
        ("negative_prompt", "grey"),
    ],
)
def test_other_settings_are_not_mixed_in(done, name, value):
    path = Path(done.output_dir, "scores-00000.jsonl")
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=f"{name}: .*now {value!r}.*another folder"):
        evaluate(changed(done, **{name: value}))
    assert path.read_bytes() == before


def test_other_models_and_captions_are_not_mixed_in(done, folder, tmp_path):
    (tmp_path / "moved").symlink_to(folder / "base")
    evaluate(changed(done, pretrained_model_name_or_path=str(tmp_path / "moved")))
    with pytest.raises(TrainingError, match=r"base: .*other"):  # told apart by their weights
        evaluate(changed(done, **base_times(tmp_path / "other", 2)))
    image_folders.coco(tmp_path / "coco", PICTURES + 1)
    with pytest.raises(TrainingError, match="data: "):
        evaluate(changed(done, eval_data_dir=str(tmp_path / "coco")))


def with_coco(change):
    """Let `change` damage COCO: its folder, or what its annotation file holds."""

    def damaged(settings, tmp_path):
        coco = tmp_path / "coco"
        image_folders.coco(coco, PICTURES)
        path = coco / "annotations" / "captions_val2017.json"
        content = json.loads(path.read_text())
        change(coco, content)
        if path.exists():
            path.write_text(json.dumps(content))
        return {"eval_data_dir": str(coco)}

    return damaged


@with_coco
def unlink_annotation(coco, content):
    (coco / "annotations" / "captions_val2017.json").unlink()


@with_coco
def unlink_picture(coco, content):
    (coco / "val2017" / "000000000004.png").unlink()


@with_coco
def no_caption(coco, content):
    content["annotations"].clear()


@with_coco
def blank_caption(coco, content):
    content["annotations"].insert(0, {"image_id": 3, "caption": " \n"})


@with_coco
def no_pictures(coco, content):
    content["images"].clear()


@with_coco
def no_lists(coco, content):
    del content["images"]


def no_folder(settings, tmp_path):
    return {"eval_data_dir": str(tmp_path / "nowhere")}


def empty_folder(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    return {"eval_data_dir": str(tmp_path / "empty")}


def file_as_out(settings, tmp_path):
    (tmp_path / "file").touch()
    return {"output_dir": str(tmp_path / "file" / "out")}


def adapter_of(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    return {"ip_adapter_path": [str(tmp_path / "a.safetensors")]}


def no_adapter(settings, tmp_path):
    return adapter_of(tmp_path, {"a": torch.zeros(1)})


def twice(settings, tmp_path):
    first = settings.ip_adapter_path[0]
    copied = shutil.copy(first, tmp_path / "copy.safetensors")
    return {"ip_adapter_path": [first, str(copied)]}


@pytest.mark.parametrize(
    "wrong, told",
    [
        (unlink_annotation, "holds val2017/, but not annotations/captions_val2017.json"),
        (unlink_picture, "1 of 5 images are missing, the first .*000000000004.png"),
        (no_caption, "5 of 5 images .* have no caption"),
        (blank_caption, "1 of 5 images .* have no caption, the first 000000000003.png"),
        (no_pictures, "names no images"),
        (no_lists, "no COCO caption file"),
        (no_folder, "nowhere' does not exist"),
        (empty_folder, "holds no annotations/captions_val2017.json"),
        (file_as_out, "Nothing can be written to .*file/out"),
        (no_adapter, "'a.safetensors' is no IP-Adapter"),
        (twice, "given twice"),
    ],
)
def test_bad_input_is_told_before_any_model_is_read(settings, tmp_path, monkeypatch, wrong, told):
    monkeypatch.setattr(script, "load_clip", lambda *_: pytest.fail("gigabytes are being read"))
    given = wrong(settings, tmp_path)
    with pytest.raises(TrainingError, match=told):
        evaluate(changed(settings, **given))
    assert "eval_data_dir" not in given or not Path(settings.output_dir).exists()


@pytest.mark.parametrize(
    "family, features, told",
    [
        ("sd15", 7, "reads image embeds 7 wide, but those of .*encoder' are 40"),
        ("sdxl", None, "made for a UNet of 4 .* over 64-wide .* base has 4 over 32-wide"),
    ],
)
def test_adapters_of_other_models_are_refused(settings, tmp_path, drawn, family, features, told):
    wrong = small.adapter(family, "base", features=features).state_dict()
    with pytest.raises(TrainingError, match=told):
        evaluate(changed(settings, **adapter_of(tmp_path, wrong)))
    assert not drawn


def test_a_diverged_base_is_named(settings, tmp_path):
    diverged = base_times(tmp_path / "base", float("inf"))
    with pytest.raises(NotFinite, match="NaN or infinite"):
        evaluate(changed(settings, **diverged, max_samples=1))


GIVEN = [
    *("--pretrained_model_name_or_path", "b", "--image_encoder_path", "e"),
    *("--eval_data_dir", "c", "--ip_adapter_path", "x"),
]


def parsed(*arguments):
    return parse(EvaluationConfig, "evaluate.py", [*GIVEN, *arguments])


def test_the_command_line():
    found = parsed("y", "--scale")
    assert (found.ip_adapter_path, found.scale) == (["x", "y"], [])
    assert (found.num_inference_steps, found.guidance_scale) == (50, 7.5)
    assert found.num_images_per_prompt == 4


@pytest.mark.parametrize(
    "name, value",
    [("num_inference_steps", "0"), ("max_samples", "0"), ("dtype", "int8"), ("resolution", "100")],
)
def test_command_line_mistakes(name, value, capsys):
    with pytest.raises(SystemExit):
        parsed(f"--{name}", value)
    assert name in capsys.readouterr().err


def test_the_script_ends_with_a_message(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *GIVEN, "--eval_data_dir=nowhere"])
    with pytest.raises(SystemExit, match=r"evaluate.py: 'nowhere' does not exist"):
        script.main()
    logging.getLogger("training").setLevel(logging.NOTSET)
