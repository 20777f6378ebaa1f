"""The one command that makes the miniature, with hardly any steps: all parts, whole and small."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from miniature import (
    adapters,
    assemble,
    base,
    build,
    concatenated,
    control,
    files,
    models,
    stages,
    workflows,
)
from miniature.scenes import mark, render, scenes
from training.models.base import load_base

STEPS = {
    "autoencoder": (2, 2),
    "image encoder": 2,
    "judge": 2,
    "latents": 100,
    "base": (2, 1),
    "pictures": 16,
    "ip-adapter": ((1, 1e-3), (1, 1e-3)),
    "ip-adapter-plus": ((1, 1e-3),),
    "control": 2,
    "second base": 2,
}
LIMIT = 32_000_000


def test_a_part_is_made_unless_it_is_there(tmp_path, monkeypatch):
    """Of the classifier, and a part that stops at its first attempt."""
    attempts, parts = [], build.Build.parts

    def stops(target):
        target.write_text("half")
        attempts.append(target)
        if len(attempts) == 1:
            raise InterruptedError
        target.write_text("whole")

    def two(self):
        (classifier,) = (part for part in parts(self) if part[1] == files.CLASSIFIER)
        return [classifier, ("stops", "stops.txt", stops)]

    monkeypatch.setattr(build.Build, "parts", two)
    work = build.Build(1, tmp_path / "work", STEPS)
    with pytest.raises(InterruptedError):
        work.run()
    made = work.work / files.CLASSIFIER
    state = load_file(made)
    assert state.keys() == models.ShapeClassifier().state_dict().keys()
    assert not (work.work / "stops.txt").exists()
    before = made.stat().st_mtime_ns
    work.run()  # goes on
    assert made.stat().st_mtime_ns == before
    assert (work.work / "stops.txt").read_text() == "whole"
    times = work.times()
    assert set(times["seconds"]) == {"judge", "stops"}
    assert times["made_on"] == [f"{torch.get_num_threads()} CPU threads"]
    with pytest.raises(stages.RecipeError, match="--work"):  # not of seed 1's parts
        build.Build(2, work.work, STEPS).run()
    again = tmp_path / "again.safetensors"
    build.Build(1, tmp_path / "again", STEPS).parts()[0][2](again)
    theirs = load_file(again)
    assert all(torch.equal(x, theirs[key]) for key, x in state.items())  # the seed says all


def test_what_several_machines_made_says_so(tmp_path, monkeypatch):
    work = build.Build(1, tmp_path)
    for hardware, part, seconds in (("one", "a", 2.4), ("another", "a", 1.0), ("one", "b", 7)):
        monkeypatch.setattr(stages, "_hardware", lambda _, name=hardware: name)
        work.note(part, seconds)
    assert work.times() == {"made_on": ["one", "another"], "seconds": {"a": 3, "b": 7}}


def test_the_device_reaches_every_part(monkeypatch, tmp_path):
    """Without a GPU: who trains is told where."""
    whole = build.Build(1, tmp_path, STEPS, "cuda")
    devices = []

    def note(*given, device, **others):
        devices.append(device)
        raise InterruptedError

    trainers = {
        models: ("train_autoencoder", "train_image_encoder", "train_classifier"),
        control: ("train_control", "train_second_base"),
        adapters: ("train", "cache"),
        base: ("train",),
        concatenated: ("train",),
    }
    for module, names in trainers.items():
        for name in names:
            monkeypatch.setattr(module, name, note)
    monkeypatch.setattr(base, "all_contexts", lambda device: note(device=device))
    monkeypatch.setattr(models, "image_tower", lambda path: None)
    monkeypatch.setattr(build.Build, "_frozen", lambda self: (None, None))
    weights = base.new(0).state_dict()
    monkeypatch.setattr(files, "load", lambda path: weights)
    pool = dict.fromkeys(("latents", "kinds", "states"))
    monkeypatch.setattr(build, "load_file", lambda path: pool)
    untrained = ("latents", "8 bits", "checkpoint", "pictures")
    trained = [part for part in whole.parts() if part[0] not in untrained]
    for _, target, make in trained:
        with pytest.raises(InterruptedError):
            make(tmp_path / target)
    assert devices == ["cuda"] * len(trained) and len(trained) == 12


@pytest.mark.parametrize(
    ("device", "told"),
    [("cuda", "no GPU.*Give cpu"), ("tpu", "cpu or cuda"), ("cuda:1", "or cuda")],
)
def test_a_device_that_is_not_there_is_named(device, told, monkeypatch):
    monkeypatch.setattr(stages.torch.cuda, "is_available", lambda: False)
    with pytest.raises(argparse.ArgumentTypeError, match=rf"{device}: .*{told}"):
        stages.device(device)
    assert stages.device("cpu") == "cpu"


def test_adapters_are_launched_where_asked_in_float32(monkeypatch):
    lines = []
    monkeypatch.setattr(adapters.subprocess, "run", lambda line, **_: lines.append(line))
    four = [Path(name) for name in ("base", "encoder", "images", "out")]
    for device in ("cpu", "cuda"):
        adapters.cache(*four, device)
        adapters.train("base", *four, 10, device)
    assert ["--cpu" in line for line in lines] == [True, True, False, False]
    for line in lines[2:]:  # not the user's own configuration
        config = load_config_from_file(line[line.index("--config_file") + 1])
        assert (config.mixed_precision, config.distributed_type.value) == ("no", "NO")
        assert not config.use_cpu and config.num_processes == 1
    for cache, training in (lines[:2], lines[2:]):
        assert cache[cache.index("--dtype") + 1] == "float32"
        assert training[training.index("--mixed_precision") + 1] == "no"


def test_steps_are_changed_by_name():
    assert build.steps('{"control": 7}') == {**build.STEPS, "control": 7}
    with pytest.raises(argparse.ArgumentTypeError, match="among autoencoder"):
        build.steps('{"controls": 7}')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole build's folder, what was shipped of it, and how each part of the base began."""
    with pytest.MonkeyPatch.context() as patch:
        few = torch.randn(len(base.all_texts()), 77, 768, generator=torch.manual_seed(0))
        patch.setattr(base, "all_contexts", lambda device: few.half())  # the true take minutes
        true, begun = base.train, []

        def train(unet, pool, context, seed, part, steps, device):
            begun.append(({k: x.half() for k, x in unet.state_dict().items()}, part, steps))
            true(unet, pool, context, seed, part, steps, device=device)

        patch.setattr(base, "train", train)
        work, out = (tmp_path_factory.mktemp(name) for name in ("work", "out"))
        whole = build.Build(1, work, STEPS)
        whole.run()
        whole.ship(out)
        return work, out, begun


@pytest.mark.nightly
def test_everything_is_made_and_shipped_and_fits(made):
    work, out, _ = made
    manifest = json.loads((out / files.MANIFEST).read_text("utf-8"))
    assert manifest["seed"] == 1
    assert manifest["steps"] == json.loads(json.dumps(STEPS))
    assert manifest["scenes"] == mark() and manifest["adapters"]["t_drop_rate"] > 0
    assert set(manifest["files"]) == {path.name for path in out.iterdir()} - {files.MANIFEST}
    assert manifest["files"].keys() == files.manifest()["files"].keys()
    for name, what in manifest["files"].items():
        assert files.checksum(out / name) == what["sha256"], name
    assert sum(path.stat().st_size for path in out.iterdir()) <= LIMIT
    assert manifest["seconds_in_all"] == sum(manifest["seconds"].values())
    assert set(manifest["seconds"]) >= {"base 1", "base 2", "control", "ip-adapter.safetensors"}
    assert manifest["made_on"].endswith("CPU threads")
    assert not list(work.glob("unfinished-*"))


@pytest.mark.nightly
def test_a_part_of_the_base_goes_on_from_the_one_before(made):
    work, _, begun = made
    (_, *first), (weights, *second) = begun
    assert first == [range(2), 3] and second == [range(2, 3), 3]
    before = load_file(work / "unet-1.safetensors")
    assert all(torch.equal(weights[key], before[key]) for key in before)
    assert any(
        not torch.equal(before[key], new) for key, new in base.new(1).half().state_dict().items()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.nightly
def test_a_gpu_makes_all_parts(tmp_path):
    whole = build.Build(1, tmp_path / "work", STEPS, "cuda")
    whole.run()
    assert whole.ship(tmp_path / "out") <= LIMIT
    assert torch.cuda.get_device_name() in whole.times()["made_on"][0]


@pytest.fixture
def laid(made, monkeypatch, tmp_path):
    """ComfyUI's base directory of what was made."""
    monkeypatch.setattr(files, "FOLDER", made[1])
    monkeypatch.setenv(assemble.FOLDER_VARIABLE, str(tmp_path))
    return assemble.ensure()


@pytest.mark.nightly
def test_the_second_base_is_the_first_with_its_matrices_changed(laid):
    first, second = (
        load_base(str(laid / "models" / "checkpoints" / name)).unet.state_dict()
        for name in (workflows.CHECKPOINT, workflows.SECOND)
    )
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    inside = {key for key, x in first.items() if key.startswith(control.CHANGED) and x.ndim > 1}
    assert changed <= inside
    assert len(changed) > len(inside) / 2  # zeros stay zeros in two steps


def test_comfyui_adds_what_training_added(base_directory, pack):
    """The control LoRA through the host's own loader and ControlNet, against `Control` itself."""
    from comfy.controlnet import load_controlnet
    from comfy.sd import load_checkpoint_guess_config

    folder = base_directory / "models"
    model = load_checkpoint_guess_config(
        str(folder / "checkpoints" / workflows.CHECKPOINT), embedding_directory=None
    )[0]
    hints = control.edges(render(scenes(3, 2)))
    loaded = load_controlnet(str(folder / "controlnet" / workflows.CONTROL))
    loaded.set_cond_hint(hints, 1.0, (0.0, 1.0))
    loaded.pre_run(model.model, lambda percent: 1e9 if percent == 0 else 0.0)
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 768)
    loaded.previous_controlnet = None
    time = torch.tensor([500, 500])
    sigma = model.model.model_sampling.sigma(time)
    noisy = latents * (sigma[0] ** 2 + 1) ** 0.5
    with torch.inference_mode():
        found = loaded.get_control(noisy, sigma, {"c_crossattn": context}, 2, {})
    loaded.cleanup()

    ours = files.frozen(control.Control(), files.FOLDER / files.CONTROL)
    unet = files.frozen(base.new(0), files.FOLDER / files.UNET)
    with torch.inference_mode():
        expected = ours(unet, latents, time, hints)
    skips = [x for x in found["output"] if x is not None]
    assert len(skips) == len(expected)
    for one, other in zip(skips, expected, strict=True):
        assert float((one.float() - other).abs().max() / other.abs().max()) < 2e-2
    assert not any(x is not None and x.any() for x in found["middle"])


def test_a_kill_while_the_recipe_was_written_hinders_nothing(tmp_path):
    class Parts(stages.Stages):
        def recipe(self):
            return {"seed": 0}

        def parts(self):
            return [("part", "part.txt", lambda target: target.write_text("made"))]

    (tmp_path / "recipe.json.0123abcd.tmp").write_text('{"se')
    Parts(tmp_path, "cpu").run()
    assert (tmp_path / "part.txt").read_text() == "made"
