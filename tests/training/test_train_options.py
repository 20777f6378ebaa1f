"""What a run can be given: another source of batches, precision, ways to save memory, samples."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import image_folders, random_models, small_models
from training.config import TrainConfig, parse
from training.errors import TrainingError

BY_TRAIN = (TrainConfig, "train.py")
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
    from training import cache

    def cached(stored="float32", **changes):
        raw = settings(**changes)
        kind = "image_embeds" if raw.variant == "base" else "penultimate_hidden_states"
        folder = str(tmp_path / f"cache-{stored}")
        given = {
            "pretrained_model_name_or_path": raw.pretrained_model_name_or_path,
            "image_encoder_path": raw.image_encoder_path,
            "train_data_dir": raw.train_data_dir,
        }
        given |= {
            "output_dir": folder,
            "resolution": raw.resolution,
            "enable_bucket": raw.enable_bucket,
            "features": kind,
        }
        cache.make(
            cache.CacheConfig(
                **given, cache_dtype=stored, rows_per_shard=16, dataloader_num_workers=0
            )
        )
        out = str(tmp_path / f"from-cache-{stored}")
        return settings(
            **{**changes, "feature_cache_dir": folder, "train_data_dir": None, "output_dir": out}
        )

    return cached


@pytest.mark.parametrize(
    "family, variant",
    [("sd15", "base"), pytest.param("sdxl", "plus", marks=pytest.mark.nightly)],
)
def test_from_a_cache_it_learns_the_same(settings, cached, family, variant, train):
    raw = settings(family, variant=variant)
    train(raw)
    from_cache = cached(family=family, variant=variant)
    train(from_cache)
    agree(weights(from_cache), weights(raw), 1e-5)
    half = cached("float16", family=family, variant=variant)
    train(half)
    agree(weights(half), weights(raw), 1e-3)


def test_a_cache_of_another_encoder(settings, cached, tmp_path, train):
    given = cached()
    torch.manual_seed(1)
    model = small_models.CLIPVisionModelWithProjection(small_models.vision_config())
    random_models.fill(model, 99).save_pretrained(tmp_path / "other")
    small_models.processor().save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match="image encoder") as error:
        train(
            settings(
                feature_cache_dir=given.feature_cache_dir,
                train_data_dir=None,
                image_encoder_path=str(tmp_path / "other"),
            )
        )
    assert "was not made for this run" in str(error.value)


def test_aspect_ratios_are_kept(settings, pictures, tmp_path, train):
    data = tmp_path / "wide"
    data.mkdir()
    for number in range(12):
        image_folders.image(number, (256, 128) if number % 2 else (192, 192)).save(
            data / f"{number}.png"
        )
        (data / f"{number}.txt").write_text("a picture")
    seen = set()
    from training.loss import DiffusionLoss

    add_noise = DiffusionLoss.add_noise

    def noting(self, latents, batch):
        seen.add(tuple(latents.shape[-2:]))
        return add_noise(self, latents, batch)

    DiffusionLoss.add_noise = noting
    try:
        train(
            settings(
                train_data_dir=str(data),
                enable_bucket=True,
                resolution=192,
                train_batch_size=2,
                max_train_steps=8,
            )
        )
    finally:
        DiffusionLoss.add_noise = add_noise
    assert len(seen) > 1


def test_from_shards_and_on_again(settings, pictures, tmp_path, train):
    (tmp_path / "shards").mkdir()
    files = sorted(pictures.iterdir())
    for shard in range(4):
        with tarfile.open(tmp_path / "shards" / f"{shard:03}.tar", "w") as tar:
            for path in files[shard * 20 : shard * 20 + 20]:
                tar.add(path, arcname=path.name)
    data = str(tmp_path / "shards" / "{000..003}.tar")
    straight = settings(
        train_data_dir=data, max_train_steps=6, output_dir=str(tmp_path / "straight")
    )
    train(straight)
    train(settings(train_data_dir=data, max_train_steps=3))
    train(settings(train_data_dir=data, max_train_steps=6))
    agree(weights(settings(), 6), weights(straight, 6), 0)


def test_gradient_checkpointing_changes_nothing(settings, finished, tmp_path, train):
    saving = settings(gradient_checkpointing=True, output_dir=str(tmp_path / "saving"))
    train(saving)
    agree(weights(saving), weights(finished), 1e-6)


@pytest.mark.nightly
def test_compiled_it_learns_the_same(settings, tmp_path, monkeypatch, train):
    plain = settings(max_train_steps=2)
    train(plain)
    compiled, compile_module = [], torch.nn.Module.compile

    def quickly(module):  # the graphs, without minutes of making kernels of them
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    given = settings(max_train_steps=2, torch_compile=True, output_dir=str(tmp_path / "compiled"))
    train(given)
    assert compiled == ["UNet2DConditionModel"]
    agree(weights(given, 2), weights(plain, 2), 1e-6)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.nightly)])
def test_half_precision_starts_from_the_weights_that_the_file_has(
    settings, frozen, tmp_path, precision, train
):
    given = settings(
        mixed_precision=precision, max_train_steps=1, learning_rate=1e-12, adam_weight_decay=0.0
    )
    train(given)
    unet = load_file(frozen / "sd15" / "unet" / "diffusion_pytorch_model.safetensors")
    mine = weights(given, 1)
    for name in ("to_k", "to_v"):
        theirs = unet[f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.{name}.weight"]
        torch.testing.assert_close(
            mine[f"ip_adapter.1.{name}_ip.weight"], theirs, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize(
    "precision, variant",
    [
        ("bf16", "plus"),
        pytest.param("bf16", "base", marks=pytest.mark.nightly),
        pytest.param("fp16", "base", marks=pytest.mark.nightly),
    ],
)
def test_half_precision_keeps_the_adapter_in_full(settings, tmp_path, precision, variant, train):
    given = settings(mixed_precision=precision, variant=variant)
    assert train(given).unet.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert all(x.dtype == torch.float32 for x in weights(given).values())
    full = settings(output_dir=str(tmp_path / "full"), variant=variant)
    train(full)
    agree(weights(given), weights(full), 1e-2)


def test_the_8_bit_optimiser_is_missed_by_name(settings, train):
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(TrainingError, match="pip install bitsandbytes"):
            train(settings(use_8bit_adam=True))
    else:
        pytest.skip("bitsandbytes is installed")


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
    assert [path.name for path in sheets] == ["step-000002.png", "step-000004.png"]
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
    (tmp_path / "my.yaml").write_text(
        "pretrained_model_name_or_path: a\nimage_encoder_path: b\noutput_dir: c\n"
        "train_data_dir: d\nseed: 3\n"
    )
    given = ["--config", str(tmp_path / "my.yaml")]
    found = parse(*BY_TRAIN, [*given, "--seed", "4", "--learning_rate", "1e-5"])
    assert (found.pretrained_model_name_or_path, found.seed, found.learning_rate) == ("a", 4, 1e-5)
    for wrong, said in (
        ("--sed", "sed"),
        ("--variant=fine", "fine"),
        ("--max_train_steps=0", "max_train_steps is 0"),
    ):
        with pytest.raises(SystemExit):
            parse(*BY_TRAIN, [*given, wrong])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(*BY_TRAIN, ["--help"])
    assert "what a crash can cost" in capsys.readouterr().out


def test_precision_in_a_file(tmp_path, capsys):
    given = [
        "--pretrained_model_name_or_path=a",
        "--image_encoder_path=b",
        "--output_dir=c",
        "--train_data_dir=d",
    ]
    (tmp_path / "my.yaml").write_text("mixed_precision: bf16\n")
    assert (
        parse(*BY_TRAIN, [*given, "--config", str(tmp_path / "my.yaml")]).mixed_precision == "bf16"
    )
    (tmp_path / "my.yaml").write_text("mixed_precision: no\n")  # False, says YAML 1.1
    with pytest.raises(SystemExit):
        parse(*BY_TRAIN, [*given, "--config", str(tmp_path / "my.yaml")])
    assert "bf16" in capsys.readouterr().err
