"""Runs of train.py: going on, being killed, being asked to stop, and what goes wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ip_adapter_core.files import adapter_file
from ip_adapter_core.files.adapter_file import trained_with
from training.errors import TrainingError
from training.trainer import Trainer

EVERYTHING = {
    "use_ema": True,
    "ema_decay": 0.9,
    "max_grad_norm": 1.0,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "snr_gamma": 5.0,
    "noise_offset": 0.05,
    "gradient_accumulation_steps": 2,
}
pytestmark = pytest.mark.usefixtures("arrow")


def checkpoint(out, step):
    return Path(out, "checkpoints", f"step-{step:07}")


def newest(out):
    return Path(out, "ip-adapter.safetensors")


def files(out, step):
    names = ("adapter.safetensors", "model.safetensors", "optimizer.bin", "scheduler.bin")
    return {name: (checkpoint(out, step) / name).read_bytes() for name in names}


def steps(out):
    return sorted(int(p.name[5:]) for p in Path(out, "checkpoints").glob("step-*"))


def check_readable(out):
    """Every file with a checkpoint's name can be read whole."""
    for step in steps(out):
        folder = checkpoint(out, step)
        adapter_file.load(folder / "adapter.safetensors")
        load_file(folder / "model.safetensors")
        torch.load(folder / "optimizer.bin", weights_only=True)
        assert json.loads((folder / "run.json").read_text())["step"] == step
    if newest(out).exists():  # a kill may come between the first checkpoint and this
        adapter_file.load(newest(out))


def after_each_step(monkeypatch, function):
    """Have `function` called with the trainer after each step."""
    after_step = Trainer.after_step

    def noting(trainer, bar):
        after_step(trainer, bar)
        function(trainer)

    monkeypatch.setattr(Trainer, "after_step", noting)


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.nightly)])
def test_going_on_gives_the_same_files(settings, tmp_path, family, train, monkeypatch):
    def crash(trainer):
        if trainer.step == 4:
            raise KeyboardInterrupt

    given = {"max_train_steps": 6, "checkpointing_steps": 3, **EVERYTHING}
    straight = settings(family, **given)
    train(straight)
    parts = replace(straight, output_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        after_each_step(patched, crash)
        train(parts)
    assert steps(parts.output_dir) == [3]
    train(parts)
    assert steps(parts.output_dir) == [3, 6]
    for step in (3, 6):
        assert files(straight.output_dir, step) == files(parts.output_dir, step)


def test_the_average_is_what_is_saved(settings, finished, tmp_path, train):
    averaged = settings(use_ema=True, ema_decay=0.5, output_dir=str(tmp_path / "averaged"))
    train(averaged)
    for out, same in ((finished.output_dir, True), (averaged.output_dir, False)):
        model, saved = load_file(checkpoint(out, 4) / "model.safetensors"), load_file(newest(out))
        assert all(torch.equal(saved[k], model[k].half()) for k in model) == same


def test_the_last_few_are_kept_and_the_file_is_the_adapters_size(settings, train):
    given = settings(max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=2)
    train(given)
    assert steps(given.output_dir) == [6, 7]
    path = newest(given.output_dir)
    assert path.read_bytes() == files(given.output_dir, 7)["adapter.safetensors"]
    parameters = sum(w.numel() for w in load_file(path).values())
    assert 2 * parameters < path.stat().st_size < 2 * parameters + 8192
    with safe_open(path, "pt") as file:
        about = file.metadata()["ip_adapter"]
    assert trained_with({"ip_adapter": about}) == given.image_encoder_path.rsplit("/", 1)[-1]
    assert json.loads(about)["step"] == 7
    assert json.loads(about)["settings"]["learning_rate"] == 1e-3
    assert given.output_dir not in about
    assert str(Path(given.pretrained_model_name_or_path).parent) not in about


@pytest.mark.parametrize(
    "wanted, last", [(1, 12), pytest.param(20, 150, marks=pytest.mark.nightly)]
)
def test_kills_lose_nothing_but_the_steps_since_the_last_save(
    settings, forked, tmp_path, train, wanted, last, monkeypatch
):
    straight = settings(max_train_steps=last, checkpointing_steps=2, checkpoints_total_limit=2)
    train(straight)
    given = replace(straight, output_dir=str(tmp_path / "killed"))
    reached = multiprocessing.get_context("fork").Value("i", 0)
    after_each_step(monkeypatch, lambda trainer: setattr(reached, "value", trainer.step))
    chance = random.Random(0)
    for _ in range(wanted):
        process = forked(train, given)
        start = reached.value
        while reached.value == start and process.is_alive():
            time.sleep(0.001)
        process.join(chance.uniform(0, 0.08))
        assert process.exitcode is None, "it was done before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        check_readable(given.output_dir)
        assert max(steps(given.output_dir), default=0) >= reached.value - given.checkpointing_steps
    train(given)
    assert files(straight.output_dir, last) == files(given.output_dir, last)
    assert not list(Path(given.output_dir, "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_first(settings, forked, number, train, monkeypatch):
    given = settings(max_train_steps=100_000, checkpointing_steps=100_000)
    started = multiprocessing.get_context("fork").Event()
    after_each_step(monkeypatch, lambda trainer: started.set())
    process = forked(train, given)
    assert started.wait(60)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    check_readable(given.output_dir)
    assert len(steps(given.output_dir)) == 1 and steps(given.output_dir)[0] < 100_000


def test_settings_of_another_run_are_refused(settings, finished, pictures, tmp_path, train):
    stored = checkpoint(finished.output_dir, 4) / "run.json"
    run = json.loads(stored.read_text())
    del run["settings"]["debiased_estimation_loss"]  # as of a run older than that option
    stored.write_text(json.dumps(run))
    kept = files(finished.output_dir, 4)
    fewer = tmp_path / "pictures"
    shutil.copytree(pictures, fewer, ignore=shutil.ignore_patterns("3*"))
    for changes, said in (
        ({"learning_rate": 1e-5}, "learning_rate was 0.001, is 1e-05"),
        ({"i_drop_rate": 0.1}, "i_drop_rate was 0.05, is 0.1"),
        ({"train_batch_size": 8}, "global batch was 4, is 8"),
        ({"variant": "full"}, "variant was base, is full"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"debiased_estimation_loss": True}, "debiased_estimation_loss was False, is True"),
        ({"lr_scheduler": "cosine"}, "max_train_steps was 4, is 8"),  # it would end elsewhere
        ({"train_data_dir": str(fewer)}, "data was"),
    ):
        with pytest.raises(TrainingError, match=said) as error:
            train(settings(max_train_steps=8, **changes))
        assert "--pretrained_ip_adapter_path" in str(error.value) and "step 4" in str(error.value)
    assert files(finished.output_dir, 4) == kept
    may_change = {"logging_steps": 2, "dataloader_num_workers": 1, "checkpoints_total_limit": 1}
    train(settings(max_train_steps=5, **may_change))
    assert steps(finished.output_dir) == [5]


def test_from_the_adapter_of_another_run(settings, finished, tmp_path, train):
    first = newest(finished.output_dir)

    def second(path=first, **changes):
        out = str(tmp_path / "second")
        return settings(pretrained_ip_adapter_path=str(path), output_dir=out, **changes)

    with pytest.raises(TrainingError, match="--variant full"):
        train(second(variant="full"))
    with pytest.raises(TrainingError, match="cannot be read"):
        train(second("nowhere.safetensors"))
    given = second(learning_rate=0.0, adam_weight_decay=0.0)
    train(given)
    before, after = (load_file(newest(x.output_dir)) for x in (finished, given))
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    "value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.nightly)]
)
def test_a_loss_that_is_not_finite(settings, monkeypatch, value, train):
    from training import loss as module

    loss, count = module.weighted_mse, []

    def failing(*args):
        count.append(1)
        return loss(*args) * (value if len(count) == 4 else 1)

    monkeypatch.setattr(module, "weighted_mse", failing)
    given = settings(max_train_steps=20, checkpointing_steps=2)
    with pytest.raises(TrainingError, match=r"loss became (nan|inf).*learning_rate"):
        train(given)
    assert steps(given.output_dir) == [2]
    check_readable(given.output_dir)


def test_a_full_disk(settings, forked, train):
    """Files cannot grow beyond a limit, as on a disk that is full: real writes fail."""
    given = settings(max_train_steps=6, checkpointing_steps=2)
    train(replace(given, max_train_steps=2))
    whole = files(given.output_dir, 2)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        said = "step 6 could not be written.*step 2 is whole.*Make room"
        with pytest.raises(TrainingError, match=said):
            train(given)

    process = forked(child)
    process.join(120)
    assert process.exitcode == 0
    assert files(given.output_dir, 2) == whole
    assert steps(given.output_dir) == [2]
    check_readable(given.output_dir)
    assert not list(Path(given.output_dir, "checkpoints").glob(".*"))
    train(given)  # with room again
    assert steps(given.output_dir) == [2, 4, 6]


def test_the_newest_file_is_put_right_after_a_kill_just_before_it(finished, train):
    newest(finished.output_dir).unlink()
    Path(finished.output_dir, "checkpoints", ".DS_Store").touch()  # not ours to delete
    train(finished)  # nothing left to do
    expected = files(finished.output_dir, 4)["adapter.safetensors"]
    assert newest(finished.output_dir).read_bytes() == expected


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mixed_precision": "fp16"}, "--mixed_precision bf16"),
        ({"use_ema": True, "ema_decay": 0.9}, "which FSDP splits"),
    ],
)
def test_what_split_adapters_cannot_do(settings, monkeypatch, changes, said, train):
    given = settings(**changes)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match=said):
        train(given)


def test_an_output_that_cannot_be_written(settings, tmp_path, train):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"Nothing can be written.*--output_dir"):
        train(settings(output_dir=str(tmp_path / "file" / "run")))


def test_broken_pictures_are_left_out_named_and_counted(
    settings, pictures, tmp_path, caplog, train
):
    data = shutil.copytree(pictures, tmp_path / "pictures")
    broken = ["03.png", "17.png"]
    for name in broken:
        os.truncate(data / name, 50)
    given = settings(train_data_dir=str(data), max_train_steps=20)
    with caplog.at_level("WARNING"):
        train(given)
    named = Path(given.output_dir, "broken-pictures-0.txt").read_text().splitlines()
    assert sorted(Path(line.split(":")[0]).name for line in named) == broken
    assert all(name in caplog.text for name in broken)
    check_readable(given.output_dir)


def test_errors_reach_a_person_without_a_traceback(tmp_path, monkeypatch):
    from training import train as script

    given = {
        "pretrained_model_name_or_path": "nowhere.safetensors",
        "image_encoder_path": "e",
        "train_data_dir": "d",
        "output_dir": tmp_path,
    }
    arguments = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit, match=r"^train.py: 'nowhere.safetensors' does not exist"):
        script.main()
