"""Runs of train.py: going on, being killed, being asked to stop, and what goes wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ip_adapter_core.files import adapter_file as checkpoint
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


def files(out, step):
    folder = Path(out, "checkpoints", f"step-{step:07}")
    names = ("adapter.safetensors", "model.safetensors", "optimizer.bin", "scheduler.bin")
    return {name: (folder / name).read_bytes() for name in names}


def steps(out):
    return sorted(int(p.name[5:]) for p in Path(out, "checkpoints").glob("step-*"))


def check_readable(out):
    """Every file with a checkpoint's name can be read whole."""
    for step in steps(out):
        folder = Path(out, "checkpoints", f"step-{step:07}")
        checkpoint.load(folder / "adapter.safetensors")
        load_file(folder / "model.safetensors")
        torch.load(folder / "optimizer.bin", weights_only=True)
        assert json.loads((folder / "run.json").read_text())["step"] == step
    newest = Path(out, "ip-adapter.safetensors")
    if newest.exists():  # a kill may come between the first checkpoint and this
        checkpoint.load(newest)


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.nightly)])
def test_going_on_gives_the_same_files(settings, tmp_path, family, train):
    given = {"max_train_steps": 6, "checkpointing_steps": 3, **EVERYTHING}
    straight = settings(family, **given)
    train(straight)
    parts = settings(family, output_dir=str(tmp_path / "parts"), **given)
    with pytest.raises(KeyboardInterrupt), stopping_after(4):
        train(parts)
    assert steps(parts.output_dir) == [3]
    train(settings(family, output_dir=parts.output_dir, **given))
    assert steps(parts.output_dir) == [3, 6]
    assert files(straight.output_dir, 6) == files(parts.output_dir, 6)
    assert files(straight.output_dir, 3) == files(parts.output_dir, 3)


class stopping_after:
    """Break off as a crash would, after so many steps."""

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        self.before = Trainer.after_step

        def after_step(trainer, bar):
            self.before(trainer, bar)
            if trainer.step == self.count:
                raise KeyboardInterrupt

        Trainer.after_step = after_step

    def __exit__(self, *exception):
        Trainer.after_step = self.before


def test_the_average_is_what_is_saved(settings, train):
    given = settings(max_train_steps=3, checkpointing_steps=3, use_ema=True, ema_decay=0.5)
    train(given)
    adapter, model = (
        load_file(Path(given.output_dir, "checkpoints/step-0000003", name))
        for name in ("adapter.safetensors", "model.safetensors")
    )
    assert any(not torch.equal(adapter[k].float(), model[k].half().float()) for k in model)
    plain = settings(
        max_train_steps=3, checkpointing_steps=3, output_dir=given.output_dir + "-plain"
    )
    train(plain)
    adapter = load_file(Path(plain.output_dir, "ip-adapter.safetensors"))
    assert all(torch.equal(adapter[k], model[k].half()) for k in model)


def test_the_last_few_are_kept_and_the_file_is_the_adapters_size(settings, train):
    given = settings(max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=2)
    train(given)
    assert steps(given.output_dir) == [6, 7]
    newest = Path(given.output_dir, "ip-adapter.safetensors")
    assert newest.read_bytes() == files(given.output_dir, 7)["adapter.safetensors"]
    parameters = sum(w.numel() for w in load_file(newest).values())
    assert 2 * parameters < newest.stat().st_size < 2 * parameters + 8192
    with safe_open(newest, "pt") as file:
        about = json.loads(file.metadata()["ip_adapter"])
    assert (about["step"], about["settings"]["learning_rate"]) == (7, 1e-3)
    assert given.output_dir not in json.dumps(about) and str(
        Path(given.pretrained_model_name_or_path).parent
    ) not in str(about)


@pytest.mark.parametrize(
    "wanted, last", [(1, 12), pytest.param(20, 400, marks=pytest.mark.nightly)]
)
def test_kills_lose_nothing_but_the_steps_since_the_last_save(
    settings, forked, tmp_path, train, wanted, last
):
    options = {"max_train_steps": last, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    straight = settings(**options)
    train(straight)
    given = settings(**options, output_dir=str(tmp_path / "killed"))
    reached = multiprocessing.get_context("fork").Value("i", 0)

    def child():
        before = Trainer.after_step

        def after_step(trainer, bar):
            before(trainer, bar)
            reached.value = trainer.step

        Trainer.after_step = after_step
        torch.set_num_threads(1)
        train(given)

    chance = random.Random(0)
    kills = 0
    while kills < wanted:
        process = forked(child)
        start = reached.value
        while reached.value == start and process.is_alive():
            time.sleep(0.001)
        process.join(chance.uniform(0, 0.08))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        check_readable(given.output_dir)
        assert max(steps(given.output_dir), default=0) >= reached.value - given.checkpointing_steps
    assert kills == wanted
    if process.exitcode != 0:
        child()
    assert files(straight.output_dir, last) == files(given.output_dir, last)
    assert not list(Path(given.output_dir, "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_first(settings, forked, number, train):
    given = settings(max_train_steps=100_000, checkpointing_steps=100_000)
    started = multiprocessing.get_context("fork").Event()

    def child():
        from training.metrics import MetricsLogger

        add = MetricsLogger.add

        def noting(*args):
            started.set()
            add(*args)

        MetricsLogger.add = noting
        torch.set_num_threads(1)
        train(given)

    process = forked(child)
    assert started.wait(60)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    check_readable(given.output_dir)
    assert len(steps(given.output_dir)) == 1 and steps(given.output_dir)[0] < 100_000
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_settings_of_another_run_are_refused(settings, finished, train):
    kept = files(finished.output_dir, 4)
    for changes, said in (
        ({"learning_rate": 1e-5}, "learning_rate was 0.001, is 1e-05"),
        ({"train_batch_size": 8}, "global batch was 4, is 8"),
        ({"variant": "full"}, "variant was base, is full"),
        ({"seed": 1}, "seed was 0, is 1"),
    ):
        with pytest.raises(TrainingError, match=said) as error:
            train(settings(max_train_steps=8, **changes))
        assert "--pretrained_ip_adapter_path" in str(error.value) and "step 4" in str(error.value)
    assert files(finished.output_dir, 4) == kept
    train(
        settings(
            max_train_steps=5, logging_steps=2, dataloader_num_workers=1, checkpoints_total_limit=1
        )
    )  # what may change
    assert steps(finished.output_dir) == [5]


def test_other_data_is_refused(settings, finished, pictures, tmp_path, train):
    copy = tmp_path / "pictures"
    copy.mkdir()
    for path in sorted(pictures.iterdir())[:24]:
        (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TrainingError, match="data was"):
        train(settings(max_train_steps=8, train_data_dir=str(copy)))


def test_from_the_adapter_of_another_run(settings, finished, tmp_path, train):
    first = finished
    second = settings(
        pretrained_ip_adapter_path=first.output_dir + "/ip-adapter.safetensors",
        output_dir=str(tmp_path / "second"),
    )
    train(replace(second, learning_rate=0.0, adam_weight_decay=0.0))
    before, after = (
        load_file(Path(x.output_dir, "ip-adapter.safetensors")) for x in (first, second)
    )
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(TrainingError, match="--variant full"):
        train(
            settings(
                pretrained_ip_adapter_path=first.output_dir + "/ip-adapter.safetensors",
                output_dir=str(tmp_path / "third"),
                variant="full",
            )
        )
    with pytest.raises(TrainingError, match="cannot be read"):
        train(
            settings(
                pretrained_ip_adapter_path="nowhere.safetensors",
                output_dir=str(tmp_path / "fourth"),
            )
        )


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


def test_a_full_disk(settings, forked, caplog, train):
    """Files cannot grow beyond a limit, as on a disk that is full: real writes fail."""
    given = settings(max_train_steps=6, checkpointing_steps=2)
    train(replace(given, max_train_steps=2))
    whole = files(given.output_dir, 2)
    said = multiprocessing.get_context("fork").Array("c", 4096)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            settings_ = settings(max_train_steps=6, checkpointing_steps=2)
            train(settings_)
        except TrainingError as error:
            said.value = str(error).encode()[:4000]

    process = forked(child)
    process.join(120)
    assert process.exitcode == 0
    message = said.value.decode()
    assert "step 6 could not be written" in message and "step 2 is whole" in message
    assert "Make room" in message
    assert files(given.output_dir, 2) == whole
    assert steps(given.output_dir) == [2]
    check_readable(given.output_dir)
    assert not list(Path(given.output_dir, "checkpoints").glob(".*"))
    train(settings(max_train_steps=6, checkpointing_steps=2))  # with room again
    assert steps(given.output_dir) == [2, 4, 6]


def test_the_newest_file_is_put_right_after_a_kill_just_before_it(settings, finished, train):
    newest = Path(finished.output_dir, "ip-adapter.safetensors")
    newest.unlink()
    (Path(finished.output_dir) / "checkpoints" / ".DS_Store").touch()  # not ours to delete
    train(settings())  # nothing left to do
    assert newest.read_bytes() == files(finished.output_dir, 4)["adapter.safetensors"]


def test_a_schedule_that_ends_elsewhere_is_another_run(settings, train):
    train(settings(lr_scheduler="cosine"))
    with pytest.raises(TrainingError, match="max_train_steps was 4, is 8"):
        train(settings(lr_scheduler="cosine", max_train_steps=8))


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
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"Nothing can be written.*--output_dir"):
        train(settings(output_dir=str(tmp_path / "file" / "run")))


def test_broken_pictures_are_left_out_named_and_counted(
    settings, pictures, tmp_path, caplog, train
):
    data = tmp_path / "pictures"
    data.mkdir()
    for path in pictures.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    for name in ("03.png", "17.png"):
        (data / name).write_bytes((data / name).read_bytes()[:50])
    given = settings(train_data_dir=str(data), max_train_steps=30)
    with caplog.at_level("WARNING"):
        train(given)
    named = Path(given.output_dir, "broken-pictures-0.txt").read_text().splitlines()
    assert sorted(line.split(":")[0].split("/")[-1] for line in named) == ["03.png", "17.png"]
    assert "03.png" in caplog.text and "17.png" in caplog.text
    check_readable(given.output_dir)


def test_errors_reach_a_person_without_a_traceback(settings, monkeypatch, capsys):
    from training import train as script

    given = {
        "pretrained_model_name_or_path": "nowhere.safetensors",
        "image_encoder_path": "e",
        "train_data_dir": "d",
        "output_dir": settings().output_dir,
    }
    arguments = [text for name, value in given.items() for text in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert str(ended.value).startswith("train.py: 'nowhere.safetensors' does not exist")
