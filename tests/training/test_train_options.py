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
from training.errors import TrainingError
from training.train import train

pytestmark = pytest.mark.usefixtures("arrow")


def weights(settings, step=4):
    return load_file(Path(settings.out, f"checkpoints/step-{step:07}/model.safetensors"))


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
        given = {"base": raw.base, "image_encoder": raw.image_encoder, "data": raw.data}
        given |= {"out": folder, "size": raw.size, "buckets": raw.buckets, "features": kind}
        cache.make(cache.CacheSettings(**given, stored=stored, shard_rows=16, workers=0))
        out = str(tmp_path / f"from-cache-{stored}")
        return settings(**{**changes, "cache": folder, "data": None, "out": out})

    return cached


@pytest.mark.parametrize("family, variant", [("sd15", "base"), ("sdxl", "plus")])
def test_from_a_cache_it_learns_the_same(settings, cached, family, variant):
    raw = settings(family, variant=variant)
    train(raw)
    from_cache = cached(family=family, variant=variant)
    train(from_cache)
    agree(weights(from_cache), weights(raw), 1e-5)
    half = cached("float16", family=family, variant=variant)
    train(half)
    agree(weights(half), weights(raw), 1e-3)


def test_a_cache_of_another_encoder(settings, cached, tmp_path):
    given = cached()
    torch.manual_seed(1)
    model = small_models.CLIPVisionModelWithProjection(small_models.vision_config())
    random_models.fill(model, 99).save_pretrained(tmp_path / "other")
    small_models.processor().save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match="image encoder") as error:
        train(settings(cache=given.cache, data=None, image_encoder=str(tmp_path / "other")))
    assert "was not made for this run" in str(error.value)


def test_aspect_ratios_are_kept(settings, pictures, tmp_path):
    data = tmp_path / "wide"
    data.mkdir()
    for number in range(12):
        image_folders.image(number, (256, 128) if number % 2 else (192, 192)).save(
            data / f"{number}.png"
        )
        (data / f"{number}.txt").write_text("a picture")
    seen = set()
    from training import loss as recipe

    noised = recipe.noised

    def noting(schedule, clean, batch):
        seen.add(tuple(clean.shape[-2:]))
        return noised(schedule, clean, batch)

    recipe.noised = noting
    try:
        train(settings(data=str(data), buckets=True, size=192, batch_size=2, steps=8))
    finally:
        recipe.noised = noised
    assert len(seen) > 1


def test_from_shards_and_on_again(settings, pictures, tmp_path):
    (tmp_path / "shards").mkdir()
    files = sorted(pictures.iterdir())
    for shard in range(4):
        with tarfile.open(tmp_path / "shards" / f"{shard:03}.tar", "w") as tar:
            for path in files[shard * 20 : shard * 20 + 20]:
                tar.add(path, arcname=path.name)
    data = str(tmp_path / "shards" / "{000..003}.tar")
    straight = settings(data=data, steps=6, out=str(tmp_path / "straight"))
    train(straight)
    train(settings(data=data, steps=3))
    train(settings(data=data, steps=6))
    agree(weights(settings(), 6), weights(straight, 6), 0)


def test_gradient_checkpointing_changes_nothing(settings, tmp_path):
    plain = settings()
    train(plain)
    saving = settings(gradient_checkpointing=True, out=str(tmp_path / "saving"))
    train(saving)
    agree(weights(saving), weights(plain), 1e-6)


def test_compiled_it_learns_the_same(settings, tmp_path, monkeypatch):
    plain = settings(steps=2)
    train(plain)
    compiled, compile_module = [], torch.nn.Module.compile

    def quickly(module):  # the graphs, without minutes of making kernels of them
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    given = settings(steps=2, compile=True, out=str(tmp_path / "compiled"))
    train(given)
    assert compiled == ["UNet2DConditionModel"]
    agree(weights(given, 2), weights(plain, 2), 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_starts_from_the_weights_that_the_file_has(
    settings, frozen, tmp_path, precision
):
    given = settings(precision=precision, steps=1, learning_rate=1e-12, weight_decay=0.0)
    train(given)
    unet = load_file(frozen / "sd15" / "unet" / "diffusion_pytorch_model.safetensors")
    mine = weights(given, 1)
    for name in ("to_k", "to_v"):
        theirs = unet[f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.{name}.weight"]
        torch.testing.assert_close(
            mine[f"ip_adapter.1.{name}_ip.weight"], theirs, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize(
    "precision, variant", [("bf16", "base"), ("bf16", "plus"), ("fp16", "base")]
)
def test_half_precision_keeps_the_adapter_in_full(
    settings, tmp_path, monkeypatch, precision, variant
):
    from training import train as script

    runs = []
    prepare = script.prepare
    monkeypatch.setattr(script, "prepare", lambda given: runs.append(prepare(given)) or runs[0])
    given = settings(precision=precision, variant=variant)
    script.train(given)
    assert runs[0].unet.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert all(x.dtype == torch.float32 for x in weights(given).values())
    monkeypatch.undo()
    full = settings(out=str(tmp_path / "full"), variant=variant)
    train(full)
    agree(weights(given), weights(full), 1e-2)


def test_the_8_bit_optimiser_is_missed_by_name(settings):
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(TrainingError, match="pip install bitsandbytes"):
            train(settings(optimizer="adamw8bit"))
    else:
        pytest.skip("bitsandbytes is installed")


def test_samples_and_curves_leave_training_as_it_is(settings, frozen, tmp_path):
    small_models.clip(tmp_path / "clip")
    image_folders.image(99).save(tmp_path / "reference.png")
    plain = settings()
    train(plain)
    watched = settings(
        out=str(tmp_path / "watched"),
        validate_every=2,
        validation_references=[str(tmp_path / "reference.png")],
        validation_weights=[0.0, 1.0],
        validation_steps=2,
        validation_clip=str(tmp_path / "clip"),
        log_with="tensorboard",
    )
    train(watched)
    agree(weights(watched), weights(plain), 0)
    sheets = sorted(Path(watched.out, "validation").glob("*.png"))
    assert [path.name for path in sheets] == ["step-000002.png", "step-000004.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 3 * 64
    (events,) = Path(watched.out, "logs", "ip-adapter").glob("events*")
    found = EventAccumulator(str(events))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"loss", "learning_rate", "samples_per_second", "waiting_for_data"} <= tags
    assert "validation/clip_i/weight_1" in tags
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]


def test_a_missing_reference_is_told_before_training(settings):
    given = settings(validate_every=2, validation_references=["nowhere.png"])
    with pytest.raises(TrainingError, match=r"nowhere\.png"):
        train(given)
    assert not list(Path(given.out, "checkpoints").iterdir())


@pytest.mark.parametrize(
    "name, said",
    [
        ("tensorbord", "expected none or one of accelerate's trackers: .*tensorboard"),
        ("aim", "its package is not installed. Install it, or give one of none, .*tensorboard"),
    ],
)
def test_a_tracker_that_would_not_log(settings, name, said, monkeypatch):
    monkeypatch.setattr("training.distributed.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(TrainingError, match=said):
        train(settings(log_with=name))


def test_what_a_cache_decides_is_told(cached, caplog):
    given = replace(cached(), buckets=True, caption_column="words")
    train(given)
    assert f"caption_column, buckets: not looked at, the cache '{given.cache}'" in caplog.text


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": None}, "--data FOLDER"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"size": 500}, "size is 500; expected a multiple of 8"),
        ({"drop_image": 0.6, "drop_text": 0.6}, "whose sum is at most 1"),
        ({"validate_every": 5}, "--validation_references"),
        ({"warmup_steps": 5}, "constant_with_warmup"),
        ({"resampler_dim": 100}, "resampler_dim is 100; expected a multiple of 64"),
        ({"resampler_depth": 0}, "resampler_depth is 0"),
    ],
)
def test_settings_that_cannot_be(settings, changes, said):
    with pytest.raises(ValueError, match=said):
        settings(**changes)


def test_settings_from_a_file_and_the_command_line(tmp_path, capsys):
    from training.config import parse

    (tmp_path / "my.yaml").write_text("base: a\nimage_encoder: b\nout: c\ndata: d\nseed: 3\n")
    found = parse(["--config", str(tmp_path / "my.yaml"), "--seed", "4", "--learning_rate", "1e-5"])
    assert (found.base, found.seed, found.learning_rate) == ("a", 4, 1e-5)
    for wrong, said in (("--sed", "sed"), ("--variant=fine", "fine"), ("--steps=0", "steps is 0")):
        with pytest.raises(SystemExit):
            parse(["--config", str(tmp_path / "my.yaml"), wrong])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "what a crash can cost" in capsys.readouterr().out


def test_precision_in_a_file(tmp_path, capsys):
    from training.config import parse

    given = ["--base=a", "--image_encoder=b", "--out=c", "--data=d"]
    (tmp_path / "my.yaml").write_text("precision: fp32\n")
    assert parse([*given, "--config", str(tmp_path / "my.yaml")]).precision == "fp32"
    (tmp_path / "my.yaml").write_text("precision: no\n")  # False, says YAML 1.1
    with pytest.raises(SystemExit):
        parse([*given, "--config", str(tmp_path / "my.yaml")])
    assert "fp32" in capsys.readouterr().err
