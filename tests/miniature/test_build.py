"""The one command that makes the miniature, with hardly any steps: all parts, whole and small."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from miniature import (
    adapters,
    autoencoder,
    base,
    build,
    command,
    concatenated,
    control,
    files,
    image_encoder,
    parts,
    setup,
    workflows,
)
from miniature import (
    classifier as judge,
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The build's folder, and what was shipped of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.torch, "get_num_threads", lambda: 1)  # one part after the other
        few = torch.randn(
            len(base.all_texts()), 77, 768, generator=torch.Generator().manual_seed(0)
        )
        patch.setattr(base, "all_contexts", lambda device: few.half())  # the true take minutes
        true, begun = base.train, []

        def train(unet, pool, context, seed, part, steps, device):
            begun.append(({k: x.half() for k, x in unet.state_dict().items()}, part, steps))
            true(unet, pool, context, seed, part, steps, device=device)

        patch.setattr(base, "train", train)
        work, out = (tmp_path_factory.mktemp(name) for name in ("work", "out"))
        whole = build.Build(1, work, STEPS)
        whole.all()
        whole.ship(out)
        before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
        whole.all()  # everything is there already
        assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before
        with pytest.raises(ValueError, match="--work"):  # not of seed 1's parts
            build.Build(2, work, STEPS).all()
        return work, out, begun


def test_everything_is_made_and_shipped_and_fits(made):
    work, out, _ = made
    manifest = json.loads((out / files.MANIFEST).read_text("utf-8"))
    assert manifest["seed"] == 1
    assert manifest["steps"] == json.loads(json.dumps(STEPS))
    assert manifest["scenes"] == mark() and manifest["adapters"]["drop_text"] > 0
    assert set(manifest["files"]) == {path.name for path in out.iterdir()} - {files.MANIFEST}
    assert {files.CONTROL, files.RESTYLED, files.CONCATENATED} <= set(manifest["files"])
    for name, what in manifest["files"].items():
        assert files.checksum(out / name) == what["sha256"], name
    assert sum(path.stat().st_size for path in out.iterdir()) <= LIMIT
    assert manifest["seconds_in_all"] == sum(manifest["seconds"].values())
    assert set(manifest["seconds"]) >= {"base 1", "base 2", "control", "ip-adapter.safetensors"}
    assert manifest["made_on"] == "1 CPU threads" and manifest["side_by_side"] == {}
    assert not list(work.glob("unfinished-*"))


SIDE_BY_SIDE = (files.JUDGE, files.AUTOENCODER)  # of the first stage
LAST = (files.ADAPTER, files.CONTROL, files.CONCATENATED)
LAST_NAMES = (files.ADAPTER, "control", "concatenated")
# Two ways of making it may differ by so much of the largest number: in Adam's first steps rounding
# can turn one. An adapter of one step leaves nothing to it.
APART = {name: 0.0 if name == files.ADAPTER else 1e-2 for name in (*SIDE_BY_SIDE, *LAST)}


@pytest.fixture
def unfinished(made, tmp_path):
    """A build that lacks some parts of the first stage and of the last."""
    work = tmp_path / "work"
    shutil.copytree(made[0], work)
    for name in (*SIDE_BY_SIDE, *LAST):
        (work / name).unlink()
    shutil.rmtree(work / "run-ip-adapter-0")
    shutil.rmtree(work / "run-ip-adapter-1")
    return build.Build(1, work, STEPS)


def test_side_by_side_parts_are_the_same(made, unfinished, monkeypatch):
    monkeypatch.setattr(build.torch, "get_num_threads", lambda: 2)
    before = unfinished.times()
    unfinished.all()
    for name in (*SIDE_BY_SIDE, *LAST):
        ours, theirs = (
            files.dequantised(load_file(folder / name)) for folder in (unfinished.work, made[0])
        )
        assert ours.keys() == theirs.keys()
        for key, one in ours.items():
            step = float(one.abs().max()) * APART[name]
            assert float((one - theirs[key]).abs().max()) <= 1e-5 + step, key
    times = unfinished.times()
    assert set(times["side_by_side"]) == {"autoencoder", "judge", *LAST_NAMES}
    together = {key: x for key, x in times["seconds"].items() if key not in before["seconds"]}
    assert set(together) == {"autoencoder + judge", " + ".join(LAST_NAMES)}
    assert all(seconds > 0 for seconds in together.values())
    assert unfinished.seconds() == sum(before["seconds"].values()) + sum(together.values())


def test_what_several_machines_made_says_so(unfinished):
    theirs = unfinished.times()
    assert theirs["made_on"] == ["1 CPU threads"]
    unfinished.hardware = "another"
    unfinished.note("a part", 2.4)
    unfinished.note("a part", 1.0)
    unfinished.hardware = "2 of its 9 threads"
    unfinished.note("beside others", 7, beside_others=True)
    times = unfinished.times()
    assert times["made_on"] == ["1 CPU threads", "another"]
    assert times["seconds"] == {**theirs["seconds"], "a part": 3}
    assert times["side_by_side"] == {"beside others": 7}
    unfinished.ship(unfinished.work / "out")
    shipped = json.loads((unfinished.work / "out" / files.MANIFEST).read_text("utf-8"))
    assert shipped["made_on"] == "1 CPU threads and another"


def test_a_part_that_fails_is_named_and_the_others_are_kept(made, unfinished, monkeypatch):
    monkeypatch.setattr(build.torch, "get_num_threads", lambda: 2)
    (*_, last) = unfinished.stages()
    for name in (files.ADAPTER, files.AUTOENCODER):
        shutil.copyfile(made[0] / name, unfinished.work / name)
    (unfinished.work / files.ENCODER).unlink()
    monkeypatch.setattr(build.Build, "stages", lambda self: (last,))
    with pytest.raises(parts.PartError, match=r"concatenated.*the same command"):
        unfinished.all()
    assert (unfinished.work / files.CONTROL).exists()


def test_the_device_reaches_every_part(made, unfinished, monkeypatch, tmp_path):
    """Without a GPU: who trains is told where, and a part's process too."""
    shutil.copyfile(made[0] / files.AUTOENCODER, unfinished.work / files.AUTOENCODER)
    unfinished.device = "cuda"
    assert dict(itertools.pairwise(unfinished.command("judge")))["--device"] == "cuda"
    told = []

    def note(*given, device, **others):
        told.append(device)
        raise InterruptedError

    for module, name in (
        *((module, "train") for module in (autoencoder, image_encoder, judge, base)),
        *((module, "train") for module in (adapters, concatenated)),
        *((control, name) for name in ("train_control", "restyle")),
        (adapters, "cache"),
    ):
        monkeypatch.setattr(module, name, note)
    monkeypatch.setattr(base, "all_contexts", lambda device: note(device=device))
    trained = [part for stage in unfinished.stages() for part in stage]
    for part in trained:
        if part.name not in ("latents", "8 bits", "checkpoint", "pictures"):
            with pytest.raises(InterruptedError):
                part.make(tmp_path / part.target)
    assert told == ["cuda"] * (len(trained) - 4)


@pytest.mark.parametrize(
    ("device", "told"),
    [("cuda", "no GPU.*Give cpu"), ("tpu", "cpu or cuda"), ("cuda:1", "or cuda")],
)
def test_a_device_that_is_not_there_is_named(device, told, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(argparse.ArgumentTypeError, match=rf"{device}: .*{told}"):
        command.device(device)
    assert command.device("cpu") == "cpu"


def test_adapters_are_launched_where_asked_in_float32(monkeypatch):
    lines = []
    monkeypatch.setattr(adapters.subprocess, "run", lambda line, **_: lines.append(line))
    four = [Path(name) for name in ("base", "encoder", "pictures", "out")]
    for device in ("cpu", "cuda"):
        adapters.cache(*four, device)
        adapters.train("base", *four, 10, device)
    assert ["--cpu" in line for line in lines] == [True, True, False, False]
    for line in lines[2:]:  # not the user's own configuration
        config = load_config_from_file(line[line.index("--config_file") + 1])
        assert (config.mixed_precision, config.distributed_type.value) == ("no", "NO")
        assert not config.use_cpu and config.num_processes == 1
    for line, precision in zip(lines, ["float32", "fp32"] * 2, strict=True):
        assert line[line.index("--precision") + 1] == precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_all_parts(tmp_path):
    whole = build.Build(1, tmp_path / "work", STEPS, "cuda")
    whole.all()
    assert whole.ship(tmp_path / "out") <= LIMIT
    assert torch.cuda.get_device_name() in whole.times()["made_on"][0]


def test_steps_are_changed_by_name():
    assert command.changed('{"control": 7}') == {**build.STEPS, "control": 7}
    with pytest.raises(argparse.ArgumentTypeError, match="among autoencoder"):
        command.changed('{"controls": 7}')


def test_a_part_of_the_base_goes_on_from_the_one_before(made):
    work, _, begun = made
    (_, *first), (weights, *second) = begun
    assert first == [range(2), 3] and second == [range(2, 3), 3]
    before = load_file(work / "unet-1.safetensors")
    assert all(torch.equal(weights[key], before[key]) for key in before)
    assert any(
        not torch.equal(before[key], new) for key, new in base.new(1).half().state_dict().items()
    )


@pytest.fixture
def laid(made, monkeypatch, tmp_path):
    """ComfyUI's base directory of what was made."""
    monkeypatch.setattr(files, "FOLDER", made[1])
    monkeypatch.setenv(setup.FOLDER_VARIABLE, str(tmp_path))
    return setup.ensure()


def test_the_second_base_is_the_first_with_its_matrices_changed(laid):
    first, second = (
        load_base(str(laid / "models" / "checkpoints" / name)).unet.state_dict()
        for name in (workflows.CHECKPOINT, workflows.SECOND)
    )
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    inside = {key for key, x in first.items() if key.startswith(control.CHANGED) and x.ndim > 1}
    assert changed <= inside
    assert len(changed) > len(inside) / 2  # zeros stay zeros in two steps


def test_comfyui_adds_what_training_added(made, laid, pack):
    """The control LoRA through the host's own loader and ControlNet, against `Control` itself."""
    from comfy.controlnet import load_controlnet
    from comfy.sd import load_checkpoint_guess_config

    model = load_checkpoint_guess_config(
        str(laid / "models" / "checkpoints" / workflows.CHECKPOINT), embedding_directory=None
    )[0]
    hints = control.edges(render(scenes(3, 2)))
    loaded = load_controlnet(str(laid / "models" / "controlnet" / workflows.CONTROL))
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

    ours = control.Control()
    state = files.dequantised(load_file(made[1] / files.CONTROL))
    ours.load_state_dict({key: x.float() for key, x in state.items()})
    unet = base.new(0)
    unet.load_state_dict(
        {k: x.float() for k, x in files.dequantised(load_file(made[1] / files.UNET)).items()}
    )
    with torch.inference_mode():
        expected = ours(unet, latents, time, hints)
    skips = [x for x in found["output"] if x is not None]
    assert len(skips) == len(expected)
    for one, other in zip(skips, expected, strict=True):
        assert float((one.float() - other).abs().max() / other.abs().max()) < 2e-2
    assert not any(x is not None and x.any() for x in found["middle"])
