"""What is wrong is told before anything is drawn; what does not belong together is refused."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace as changed
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import image_folders
from tests.support import small_models as small
from training import evaluate as script
from training.config import parse
from training.errors import TrainingError
from training.evaluate import EvaluationConfig, evaluate
from training.sampling import NotFinite

PICTURES = 5  # conftest.py's


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
def test_other_settings_are_not_mixed_in(settings, name, value):
    evaluate(changed(settings, max_samples=1, scale=()))
    path = Path(settings.output_dir, "scores-00000.jsonl")
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=f"{name}: .*now {value!r}.*another folder"):
        evaluate(changed(settings, max_samples=1, scale=(), **{name: value}))
    assert path.read_bytes() == before


def test_models_are_told_apart_by_their_weights(settings, folder, tmp_path):
    evaluate(changed(settings, max_samples=1, scale=()))
    (tmp_path / "moved").symlink_to(folder / "base")
    evaluate(
        changed(
            settings, max_samples=1, scale=(), pretrained_model_name_or_path=str(tmp_path / "moved")
        )
    )
    pipeline = small.base(tmp_path / "other", "sd15", levels=2)
    pipeline.unet.conv_out.weight.mul_(2)
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match=r"base: .*other"):
        evaluate(
            changed(
                settings,
                max_samples=1,
                scale=(),
                pretrained_model_name_or_path=str(tmp_path / "other"),
            )
        )


def test_other_captions_are_not_mixed_in(settings, folder, tmp_path):
    evaluate(changed(settings, max_samples=1, scale=()))
    image_folders.coco(tmp_path / "coco", PICTURES + 1)
    with pytest.raises(TrainingError, match="data: "):
        evaluate(changed(settings, max_samples=1, scale=(), eval_data_dir=str(tmp_path / "coco")))


def coco_with(folder, change):
    path = folder / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def unlink_annotation(root):
    (root / "coco/annotations/captions_val2017.json").unlink()


def unlink_picture(root):
    (root / "coco/val2017/000000000004.png").unlink()


def no_caption(root):
    coco_with(root / "coco", lambda content: content["annotations"].clear())


def blank_caption(root):
    blank = {"image_id": 3, "caption": " \n"}
    coco_with(root / "coco", lambda content: content["annotations"].insert(0, blank))


def no_pictures(root):
    coco_with(root / "coco", lambda content: content["images"].clear())


def no_lists(root):
    coco_with(root / "coco", lambda content: content.pop("images"))


@pytest.mark.parametrize(
    "damage, told",
    [
        (unlink_annotation, "holds val2017/, but not annotations/captions_val2017.json"),
        (unlink_picture, "1 of 5 images are missing, the first .*000000000004.png"),
        (no_caption, "5 of 5 images .* have no caption"),
        (blank_caption, "1 of 5 images .* have no caption, the first 000000000003.png"),
        (no_pictures, "names no images"),
        (no_lists, "no COCO caption file"),
    ],
)
def test_an_incomplete_coco(settings, tmp_path, drawn, damage, told):
    image_folders.coco(tmp_path / "coco", PICTURES)
    damage(tmp_path)
    with pytest.raises(TrainingError, match=told):
        evaluate(changed(settings, eval_data_dir=str(tmp_path / "coco")))
    assert not drawn and not Path(settings.output_dir).exists()


def wrong_encoder(settings, tmp_path):
    save_file(small.adapter("sd15", "base", features=7).state_dict(), tmp_path / "a.safetensors")
    return {"ip_adapter_path": [str(tmp_path / "a.safetensors")]}


def wrong_base(settings, tmp_path):
    save_file(small.adapter("sdxl", "base").state_dict(), tmp_path / "a.safetensors")
    return {"ip_adapter_path": [str(tmp_path / "a.safetensors")]}


def no_adapter(settings, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    return {"ip_adapter_path": [str(tmp_path / "a.safetensors")]}


def twice(settings, tmp_path):
    copied = tmp_path / "copy.safetensors"
    save_file(load_file(settings.ip_adapter_path[0]), copied)
    copied.write_bytes(Path(settings.ip_adapter_path[0]).read_bytes())
    return {"ip_adapter_path": [settings.ip_adapter_path[0], str(copied)]}


def no_folder(settings, tmp_path):
    return {"eval_data_dir": str(tmp_path / "nowhere")}


def empty_folder(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    return {"eval_data_dir": str(tmp_path / "empty")}


def file_as_out(settings, tmp_path):
    (tmp_path / "file").touch()
    return {"output_dir": str(tmp_path / "file" / "out")}


@pytest.mark.parametrize(
    "wrong, told",
    [
        (wrong_encoder, "reads image embeds 7 wide, but those of .*encoder' are 40"),
        (wrong_base, "made for a UNet of 4 .* over 64-wide .* base has 4 over 32-wide"),
        (no_adapter, "'a.safetensors' is no IP-Adapter"),
        (twice, "given twice"),
        (no_folder, "nowhere' does not exist"),
        (empty_folder, "holds no annotations/captions_val2017.json"),
        (file_as_out, "Nothing can be written to .*file/out"),
    ],
)
def test_bad_input_is_told_before_anything_is_drawn(settings, tmp_path, drawn, wrong, told):
    with pytest.raises(TrainingError, match=told):
        evaluate(changed(settings, **wrong(settings, tmp_path)))
    assert not drawn


def test_models_are_not_loaded_for_nothing(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_clip", lambda *_: pytest.fail("gigabytes are being read"))
    for wrong in (no_folder, file_as_out, no_adapter, twice):
        with pytest.raises(TrainingError):
            evaluate(changed(settings, **wrong(settings, tmp_path)))


def test_a_diverged_base_is_named(settings, tmp_path):
    pipeline = small.base(tmp_path / "base", "sd15", levels=2)
    pipeline.unet.conv_out.weight.mul_(float("inf"))
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(NotFinite, match="NaN or infinite"):
        evaluate(
            changed(settings, pretrained_model_name_or_path=str(tmp_path / "base"), max_samples=1)
        )


GIVEN = [
    *("--pretrained_model_name_or_path", "b", "--image_encoder_path", "e"),
    *("--eval_data_dir", "c", "--ip_adapter_path", "x"),
]


def parsed(arguments):
    return parse(EvaluationConfig, "evaluate.py", arguments)


def test_command_line_over_yaml(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "pretrained_model_name_or_path: b\nimage_encoder_path: e\neval_data_dir: c\n"
        "ip_adapter_path: [x.bin]\nnum_inference_steps: 7\nscale: [0.3]\n"
    )
    found = parsed(["--config", str(tmp_path / "my.yaml"), "--num_inference_steps", "9"])
    assert (found.num_inference_steps, found.scale) == (9, [0.3])
    assert found.ip_adapter_path == ["x.bin"]
    found = parsed([*GIVEN, "y"])
    assert found.ip_adapter_path == ["x", "y"]
    assert (found.num_inference_steps, found.guidance_scale) == (50, 7.5)
    assert (found.num_images_per_prompt, parsed([*GIVEN, "--scale"]).scale) == (4, [])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--num_inference_steps", "0"],
        ["--max_samples", "0"],
        ["--dtype", "int8"],
        ["--resolution", "100"],
    ],
)
def test_command_line_mistakes(wrong, capsys):
    with pytest.raises(SystemExit):
        parsed([*GIVEN, *wrong])
    assert wrong[0].removeprefix("--") in capsys.readouterr().err


def test_the_script_ends_with_a_message(settings, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *GIVEN, "--eval_data_dir=nowhere"])
    with pytest.raises(SystemExit, match=r"evaluate.py: 'nowhere' does not exist"):
        script.main()
    logging.getLogger("training").setLevel(logging.NOTSET)
