"""What a run can be given: another source of batches, precision, ways to save memory, samples."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPVisionModelWithProjection

from ip_adapter_core.adapter import PROJECTIONS
from tests.support import image_folders, random_models, small_models
from tests.support.sets import nightly
from training import cache
from training.config import TrainConfig, parse
from training.distributed import DTYPES
from training.errors import TrainingError
from training.loss import DiffusionLoss
from training.trainer import Trainer

REQUIRED = ("pretrained_model_name_or_path", "image_encoder_path", "output_dir", "train_data_dir")
pytestmark = pytest.mark.usefixtures("arrow")


def weights(settings, step=4):
    return load_file(Path(settings.output_dir, f"checkpoints/step-{step:07}/model.safetensors"))


def agree(found, expected, tolerance):
    """All weights together: single ones that start at 0 are as large as their noise."""
    difference = sum((found[k] - v).square().sum() for k, v in expected.items()).sqrt()
    assert difference <= tolerance * sum(v.square().sum() for v in expected.values()).sqrt()


@pytest.fixture
def cached(settings, tmp_path):
    """The same settings, from a cache made for them."""

    def cached(stored="float32", **changes):
        raw = settings(**changes)
        folder = str(tmp_path / f"cache-{stored}")
        made = cache.CacheConfig(
            pretrained_model_name_or_path=raw.pretrained_model_name_or_path,
            image_encoder_path=raw.image_encoder_path,
            train_data_dir=raw.train_data_dir,
            output_dir=folder,
            resolution=raw.resolution,
            features=PROJECTIONS[raw.variant].features,
            cache_dtype=stored,
            rows_per_shard=16,
            dataloader_num_workers=0,
        )
        cache.make(made)
        out = str(tmp_path / f"from-cache-{stored}")
        return replace(raw, feature_cache_dir=folder, train_data_dir=None, output_dir=out)

    return cached


@pytest.mark.parametrize(
    "family, variant",
    [("sd15", "base"), *nightly(("sdxl", "plus"))],
)
def test_from_a_cache_it_learns_the_same(settings, cached, family, variant, train):
    raw = settings(family, variant=variant)
    train(raw)
    for stored, tolerance in (("float32", 1e-5), ("float16", 1e-3)):
        from_cache = cached(stored, family=family, variant=variant)
        train(from_cache)
        agree(weights(from_cache), weights(raw), tolerance)


def test_a_cache_of_another_encoder(cached, tmp_path, train):
    model = CLIPVisionModelWithProjection(small_models.vision_config())
    random_models.fill(model, 99).save_pretrained(tmp_path / "other")
    small_models.processor().save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match=r"was not made for this run.*image encoder"):
        train(replace(cached(), image_encoder_path=str(tmp_path / "other")))


def test_what_a_cache_left_out_is_on_the_runs_page(cached, pictures, tmp_path, train):
    data = shutil.copytree(pictures, tmp_path / "pictures")
    os.truncate(data / "03.png", 50)
    given = cached(train_data_dir=str(data), max_train_steps=1)
    train(given)
    assert "<li>03.png: " in Path(given.output_dir, "report.html").read_text("utf-8")


def test_aspect_ratios_are_kept(settings, tmp_path, monkeypatch, train):
    image_folders.with_metadata(tmp_path / "wide", 12, [(192, 192), (256, 128)])
    seen = set()
    add_noise = DiffusionLoss.add_noise

    def noting(self, latents, batch):
        seen.add(tuple(latents.shape[-2:]))
        return add_noise(self, latents, batch)

    monkeypatch.setattr(DiffusionLoss, "add_noise", noting)
    buckets = {"enable_bucket": True, "resolution": 192, "train_batch_size": 2}
    train(settings(train_data_dir=str(tmp_path / "wide"), max_train_steps=8, **buckets))
    assert len(seen) > 1


def test_from_shards_and_on_again(settings, pictures, tmp_path, train):
    files = sorted(pictures.iterdir())
    for number in range(4):
        members = files[number * 20 : number * 20 + 20]
        content = {path.name: path.read_bytes() for path in members}
        image_folders.shard(tmp_path / f"{number:03}.tar", content)
    parts = settings(train_data_dir=str(tmp_path / "{000..003}.tar"), max_train_steps=6)
    straight = replace(parts, output_dir=str(tmp_path / "straight"))
    train(straight)
    train(replace(parts, max_train_steps=3))
    train(parts)
    agree(weights(parts, 6), weights(straight, 6), 0)


def test_gradient_checkpointing_changes_nothing(finished, tmp_path, train):
    saving = replace(finished, gradient_checkpointing=True, output_dir=str(tmp_path / "saving"))
    train(saving)
    agree(weights(saving), weights(finished), 1e-6)


@pytest.mark.nightly
def test_compiled_it_learns_the_same(settings, tmp_path, monkeypatch, train):
    plain = settings(max_train_steps=2)
    train(plain)
    given = replace(plain, torch_compile=True, output_dir=str(tmp_path / "compiled"))
    compiled, compile_module = [], torch.nn.Module.compile

    def quickly(module):  # the graphs, without minutes of making kernels of them
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    train(given)
    assert compiled == ["UNet2DConditionModel"]
    agree(weights(given, 2), weights(plain, 2), 1e-6)


@pytest.mark.parametrize(
    "precision, variant",
    [("bf16", "plus"), *nightly(("bf16", "base"), ("fp16", "base"))],
)
def test_half_precision_keeps_the_adapter_in_full(
    settings, frozen, tmp_path, precision, variant, train
):
    full = settings(output_dir=str(tmp_path / "full"), variant=variant)
    train(full)
    given = settings(mixed_precision=precision, variant=variant)
    trainer = Trainer(given)
    start = trainer.sampled().state_dict()
    theirs = load_file(frozen / "sd15" / "unet" / "diffusion_pytorch_model.safetensors")
    for name in ("to_k", "to_v"):  # exactly those of the file, in float32
        key = f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.{name}.weight"
        assert torch.equal(start[f"ip_adapter.1.{name}_ip.weight"], theirs[key])
    trainer.train()
    assert trainer.unet.dtype == DTYPES[precision]
    assert all(x.dtype == torch.float32 for x in weights(given).values())
    agree(weights(given), weights(full), 1e-2)


def test_the_8_bit_optimiser_is_missed_by_name(settings, monkeypatch, train):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(TrainingError, match="pip install bitsandbytes"):
        train(settings(use_8bit_adam=True))


def test_samples_and_curves_leave_training_as_it_is(settings, finished, tmp_path, train):
    small_models.clip(tmp_path / "clip")
    image_folders.image(99).save(tmp_path / "reference.png")
    watched = settings(
        output_dir=str(tmp_path / "watched"),
        validation_steps=2,
        validation_image=[str(tmp_path / "reference.png")],
        validation_scale=[0.0, 1.0],
        validation_num_inference_steps=2,
        validation_clip_model=str(tmp_path / "clip"),
        report_to="tensorboard",
    )
    train(watched)
    agree(weights(watched), weights(finished), 0)
    sheets = sorted(Path(watched.output_dir, "validation").glob("*.png"))
    assert [path.name for path in sheets] == [f"step-{step:06}.png" for step in (0, 2, 4)]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 3 * 64
    (events,) = Path(watched.output_dir, "logs", "ip-adapter").glob("events*")
    found = EventAccumulator(str(events))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"loss", "learning_rate", "samples_per_second", "waiting_for_data"} <= tags
    assert "validation/clip_i/weight_1" in tags
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]


def test_a_missing_reference_is_told_before_training(settings, train):
    given = settings(validation_steps=2, validation_image=["nowhere.png"])
    with pytest.raises(TrainingError, match=r"nowhere\.png"):
        train(given)
    assert not list(Path(given.output_dir, "checkpoints").iterdir())


@pytest.mark.parametrize(
    "name, said",
    [
        ("tensorbord", "expected none or one of accelerate's trackers: .*tensorboard"),
        ("aim", "its package is not installed. Install it, or give one of none, .*tensorboard"),
    ],
)
def test_a_tracker_that_would_not_log(settings, name, said, monkeypatch, train):
    monkeypatch.setattr("training.distributed.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(TrainingError, match=said):
        train(settings(report_to=name))


def test_what_a_cache_decides_is_told(cached, caplog, train):
    given = replace(cached(), enable_bucket=True, caption_column="words")
    train(given)
    assert (
        f"caption_column, enable_bucket: not looked at, the cache '{given.feature_cache_dir}'"
        in caplog.text
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train_data_dir": None}, "--train_data_dir FOLDER"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"resolution": 500}, "resolution is 500; expected a multiple of 8"),
        ({"i_drop_rate": 0.6, "t_drop_rate": 0.6}, "whose sum is at most 1"),
        ({"validation_steps": 5}, "--validation_image"),
        ({"lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"resampler_dim": 100}, "resampler_dim is 100; expected a multiple of 64"),
        ({"resampler_depth": 0}, "resampler_depth is 0"),
    ],
)
def test_settings_that_cannot_be(settings, changes, said):
    with pytest.raises(ValueError, match=said):
        settings(**changes)


def test_settings_from_a_file_and_the_command_line(tmp_path, capsys):
    file = tmp_path / "my.yaml"
    file.write_text("seed: 3\nmixed_precision: bf16\nvalidation_scale: [0.3]\n")
    given = [f"--{name}=a" for name in REQUIRED] + ["--config", str(file)]
    found = parse(TrainConfig, "train.py", [*given, "--seed", "4", "--learning_rate", "1e-5"])
    assert (found.seed, found.learning_rate, found.validation_scale) == (4, 1e-5, [0.3])
    assert found.mixed_precision == "bf16"

    def told(*options):
        with pytest.raises(SystemExit):
            parse(TrainConfig, "train.py", [*given, *options])
        return "".join(capsys.readouterr())

    assert "sed" in told("--sed")
    assert "fine" in told("--variant=fine")
    assert "max_train_steps is 0" in told("--max_train_steps=0")
    assert "what a crash can cost" in told("--help")
    file.write_text("mixed_precision: no\n")  # False, says YAML 1.1
    assert "bf16" in told()
