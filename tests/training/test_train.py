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
from training.train import train

EVERYTHING = {
    "ema": 0.9,
    "clip_norm": 1.0,
    "schedule": "cosine",
    "warmup_steps": 2,
    "min_snr_gamma": 5.0,
    "noise_offset": 0.05,
    "accumulation": 2,
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


@pytest.fixture
def forked():
    """Run a function in a child process that has all imports done already."""
    context = multiprocessing.get_context("fork")
    children = []

    def forked(function, *args):
        children.append(context.Process(target=function, args=args))
        children[-1].start()
        return children[-1]

    yield forked
    for child in children:
        child.kill()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_going_on_gives_the_same_files(settings, tmp_path, family):
    straight = settings(family, steps=6, save_every=3, **EVERYTHING)
    train(straight)
    parts = settings(family, steps=6, save_every=3, out=str(tmp_path / "parts"), **EVERYTHING)
    stopped = settings(family, steps=6, save_every=3, out=parts.out, **EVERYTHING)
    with pytest.raises(KeyboardInterrupt), stopping_after(4):
        train(stopped)
    assert steps(parts.out) == [3]
    train(settings(family, steps=6, save_every=3, out=parts.out, **EVERYTHING))
    assert steps(parts.out) == [3, 6]
    assert files(straight.out, 6) == files(parts.out, 6)
    assert files(straight.out, 3) == files(parts.out, 3)


class stopping_after:
    """Break off as a crash would, after so many steps."""

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        from training.run import Run

        self.before = Run.after_step

        def after_step(run, bar):
            self.before(run, bar)
            if run.step == self.count:
                raise KeyboardInterrupt

        Run.after_step = after_step

    def __exit__(self, *exception):
        from training.run import Run

        Run.after_step = self.before


def test_the_average_is_what_is_saved(settings):
    given = settings(steps=3, save_every=3, ema=0.5)
    train(given)
    adapter, model = (
        load_file(Path(given.out, "checkpoints/step-0000003", name))
        for name in ("adapter.safetensors", "model.safetensors")
    )
    assert any(not torch.equal(adapter[k].float(), model[k].half().float()) for k in model)
    plain = settings(steps=3, save_every=3, out=given.out + "-plain")
    train(plain)
    adapter = load_file(Path(plain.out, "ip-adapter.safetensors"))
    assert all(torch.equal(adapter[k], model[k].half()) for k in model)


def test_the_last_few_are_kept_and_the_file_is_the_adapters_size(settings):
    given = settings(steps=7, save_every=2, keep=2)
    train(given)
    assert steps(given.out) == [6, 7]
    newest = Path(given.out, "ip-adapter.safetensors")
    assert newest.read_bytes() == files(given.out, 7)["adapter.safetensors"]
    parameters = sum(w.numel() for w in load_file(newest).values())
    assert 2 * parameters < newest.stat().st_size < 2 * parameters + 8192
    with safe_open(newest, "pt") as file:
        about = json.loads(file.metadata()["ip_adapter"])
    assert (about["step"], about["settings"]["learning_rate"]) == (7, 1e-3)
    assert given.out not in json.dumps(about) and str(Path(given.base).parent) not in str(about)


def test_twenty_kills_lose_nothing_but_the_steps_since_the_last_save(settings, forked, tmp_path):
    straight = settings(steps=400, save_every=2, keep=2)
    train(straight)
    given = settings(steps=400, save_every=2, keep=2, out=str(tmp_path / "killed"))
    reached = multiprocessing.get_context("fork").Value("i", 0)

    def child():
        from training.run import Run

        before = Run.after_step

        def after_step(run, bar):
            before(run, bar)
            reached.value = run.step

        Run.after_step = after_step
        torch.set_num_threads(1)
        train(given)

    chance = random.Random(0)
    kills = 0
    while kills < 20:
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
        check_readable(given.out)
        assert max(steps(given.out), default=0) >= reached.value - given.save_every
    assert kills == 20
    if process.exitcode != 0:
        child()
    assert files(straight.out, 400) == files(given.out, 400)
    assert not list(Path(given.out, "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_first(settings, forked, number):
    given = settings(steps=100_000, save_every=100_000)
    started = multiprocessing.get_context("fork").Event()

    def child():
        from training.metrics import Meter

        add = Meter.add

        def noting(*args):
            started.set()
            add(*args)

        Meter.add = noting
        torch.set_num_threads(1)
        train(given)

    process = forked(child)
    assert started.wait(60)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    check_readable(given.out)
    assert len(steps(given.out)) == 1 and steps(given.out)[0] < 100_000
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_settings_of_another_run_are_refused(settings):
    train(settings())
    kept = files(settings().out, 4)
    for changes, said in (
        ({"learning_rate": 1e-5}, "learning_rate was 0.001, is 1e-05"),
        ({"batch_size": 8}, "global batch was 4, is 8"),
        ({"variant": "full"}, "variant was base, is full"),
        ({"seed": 1}, "seed was 0, is 1"),
    ):
        with pytest.raises(TrainingError, match=said) as error:
            train(settings(steps=8, **changes))
        assert "--adapter" in str(error.value) and "step 4" in str(error.value)
    assert files(settings().out, 4) == kept
    train(settings(steps=5, log_every=2, workers=1, keep=1))  # what may change
    assert steps(settings().out) == [5]


def test_other_data_is_refused(settings, pictures, tmp_path):
    train(settings())
    copy = tmp_path / "pictures"
    copy.mkdir()
    for path in sorted(pictures.iterdir())[:24]:
        (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TrainingError, match="data was"):
        train(settings(steps=8, data=str(copy)))


def test_from_the_adapter_of_another_run(settings, tmp_path):
    first = settings()
    train(first)
    second = settings(adapter=first.out + "/ip-adapter.safetensors", out=str(tmp_path / "second"))
    train(replace(second, learning_rate=0.0, weight_decay=0.0))
    before, after = (load_file(Path(x.out, "ip-adapter.safetensors")) for x in (first, second))
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(TrainingError, match="--variant full"):
        train(
            settings(
                adapter=first.out + "/ip-adapter.safetensors",
                out=str(tmp_path / "third"),
                variant="full",
            )
        )
    with pytest.raises(TrainingError, match="cannot be read"):
        train(settings(adapter="nowhere.safetensors", out=str(tmp_path / "fourth")))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(settings, monkeypatch, value):
    from training import loss as recipe

    loss, count = recipe.loss, []

    def failing(*args):
        count.append(1)
        return loss(*args) * (value if len(count) == 4 else 1)

    monkeypatch.setattr(recipe, "loss", failing)
    given = settings(steps=20, save_every=2)
    with pytest.raises(TrainingError, match=r"loss became (nan|inf).*learning_rate"):
        train(given)
    assert steps(given.out) == [2]
    check_readable(given.out)


def test_a_full_disk(settings, forked, caplog):
    """Files cannot grow beyond a limit, as on a disk that is full: real writes fail."""
    given = settings(steps=6, save_every=2)
    train(replace(given, steps=2))
    whole = files(given.out, 2)
    said = multiprocessing.get_context("fork").Array("c", 4096)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            settings_ = settings(steps=6, save_every=2)
            train(settings_)
        except TrainingError as error:
            said.value = str(error).encode()[:4000]

    process = forked(child)
    process.join(120)
    assert process.exitcode == 0
    message = said.value.decode()
    assert "step 6 could not be written" in message and "step 2 is whole" in message
    assert "Make room" in message
    assert files(given.out, 2) == whole
    assert steps(given.out) == [2]
    check_readable(given.out)
    assert not list(Path(given.out, "checkpoints").glob(".*"))
    train(settings(steps=6, save_every=2))  # with room again
    assert steps(given.out) == [2, 4, 6]


def test_the_newest_file_is_put_right_after_a_kill_just_before_it(settings):
    given = settings()
    train(given)
    newest = Path(given.out, "ip-adapter.safetensors")
    newest.unlink()
    (Path(given.out) / "checkpoints" / ".DS_Store").touch()  # not ours to delete
    train(settings())  # nothing left to do
    assert newest.read_bytes() == files(given.out, 4)["adapter.safetensors"]


def test_a_schedule_that_ends_elsewhere_is_another_run(settings):
    train(settings(schedule="cosine"))
    with pytest.raises(TrainingError, match="steps was 4, is 8"):
        train(settings(schedule="cosine", steps=8))


@pytest.mark.parametrize(
    "changes, said",
    [({"precision": "fp16"}, "--precision bf16"), ({"ema": 0.9}, "which FSDP splits")],
)
def test_what_split_adapters_cannot_do(settings, monkeypatch, changes, said):
    given = settings(**changes)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match=said):
        train(given)


def test_an_output_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"Nothing can be written.*--out"):
        train(settings(out=str(tmp_path / "file" / "run")))


def test_broken_pictures_are_left_out_named_and_counted(settings, pictures, tmp_path, caplog):
    data = tmp_path / "pictures"
    data.mkdir()
    for path in pictures.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    for name in ("03.png", "17.png"):
        (data / name).write_bytes((data / name).read_bytes()[:50])
    given = settings(data=str(data), steps=30)
    with caplog.at_level("WARNING"):
        train(given)
    named = Path(given.out, "broken-pictures-0.txt").read_text().splitlines()
    assert sorted(line.split(":")[0].split("/")[-1] for line in named) == ["03.png", "17.png"]
    assert "03.png" in caplog.text and "17.png" in caplog.text
    check_readable(given.out)


def test_errors_reach_a_person_without_a_traceback(settings, monkeypatch, capsys):
    from training import train as script

    given = {
        "base": "nowhere.safetensors",
        "image_encoder": "e",
        "data": "d",
        "out": settings().out,
    }
    arguments = [text for name, value in given.items() for text in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert str(ended.value).startswith("train.py: 'nowhere.safetensors' does not exist")
