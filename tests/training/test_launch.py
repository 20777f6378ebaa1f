"""Through `accelerate launch`, as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import distributed
from training.config import TrainConfig
from training.distributed import begin
from training.errors import TrainingError
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("arrow")


def command(settings: TrainConfig, processes: int) -> list[str]:
    """The command line of these settings."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    changed = {n: v for n, v in vars(settings).items() if v != defaults[n]}
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    if processes > 1:
        launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        *(sys.executable, "-m", *launch, str(ROOT / "training" / "train.py")),
        *(f"--{name}={value}" for name, value in changed.items()),
    ]


@pytest.fixture
def environment(tmp_path_factory) -> dict[str, str]:
    cache = tmp_path_factory.getbasetemp() / "datasets"
    return {**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def as_rank(rank: int, port: int, given: TrainConfig) -> None:
    """Train as one of two processes, with the variables that torchrun sets."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank}
    where |= {"LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    begin()
    Trainer(given).train()


@pytest.mark.parametrize("launch", ["forked", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_two_processes_follow_one(settings, tmp_path, environment, train, forked, launch):
    """With half the batch each; clipping, accumulation and the average included."""
    more = {
        "max_grad_norm": 0.1,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_decay": 0.5,
        "i_drop_rate": 0.3,
        "t_drop_rate": 0.3,
    }
    one = settings(max_train_steps=6, **more)
    train(one)
    two = settings(max_train_steps=6, train_batch_size=2, output_dir=str(tmp_path / "two"), **more)
    if launch == "forked":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [forked(as_rank, rank, port, two) for rank in range(2)]
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    else:
        result = subprocess.run(
            command(two, 2), env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    assert not (tmp_path / "two" / "checkpoints" / "step-0000012").exists()
    name = "checkpoints/step-0000006/model.safetensors"
    found, expected = load_file(Path(two.output_dir, name)), load_file(Path(one.output_dir, name))
    start = settings(
        max_train_steps=1,
        learning_rate=0.0,
        adam_weight_decay=0.0,
        output_dir=str(tmp_path / "start"),
    )
    train(start)
    before = load_file(Path(start.output_dir, "checkpoints/step-0000001/model.safetensors"))
    for key, value in found.items():
        moved = (expected[key] - before[key]).norm()
        assert moved > 0
        assert (value - expected[key]).norm() < 1e-3 * moved, key
    # It goes on in one process too: what a sample is does not depend on how many there are.
    train(settings(max_train_steps=7, output_dir=two.output_dir, **more))
    assert Path(two.output_dir, "checkpoints/step-0000007").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a launcher's end is not told")
def test_the_end_of_accelerate_launch_is_a_sigterm(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"python\0bin/accelerate\0launch")
    ready, told = tmp_path / "ready", tmp_path / "told"

    def script():
        signal.signal(signal.SIGTERM, lambda *_: (told.touch(), os._exit(0)))
        distributed._follow_launcher()
        ready.touch()
        time.sleep(60)

    if (launcher := os.fork()) == 0:
        if os.fork() == 0:
            script()
        time.sleep(60)
        os._exit(0)
    wait_for(ready)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    wait_for(told)


def wait_for(path: Path) -> None:
    """Return once a file is there; it has to be within half a minute."""
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} did not come"
        time.sleep(0.01)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a launcher's end is not told")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_scheduler_that_ends_the_launcher(settings, tmp_path, environment, processes):
    given = settings(max_train_steps=1_000_000, checkpointing_steps=1_000_000)
    with open(tmp_path / "log", "w+") as log:
        launcher = subprocess.Popen(
            command(given, processes), env=environment, cwd=tmp_path, stdout=log, stderr=log
        )
        until = time.monotonic() + 120
        while "loss=" not in (tmp_path / "log").read_text() and time.monotonic() < until:
            assert launcher.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        os.kill(launcher.pid, signal.SIGTERM)
        launcher.wait(60)
        newest = Path(given.output_dir, "ip-adapter.safetensors")
        while not newest.exists() and time.monotonic() < until:
            time.sleep(0.1)
    assert load_file(newest), (tmp_path / "log").read_text()


def test_several_processes_on_cpus_are_refused(monkeypatch, accelerate_anew):
    """With the variables that `accelerate launch --cpu --num_processes 2` sets."""
    where = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    for name, value in {**where, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="torchrun --nproc_per_node N"):
        begin()


@pytest.mark.nightly
def test_accelerate_launch_of_several_processes_on_cpus(settings, tmp_path, environment):
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    given = command(settings(), 1)
    result = subprocess.run(
        [*given[:2], *launch, *given[6:]],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "torchrun --nproc_per_node N" in result.stderr
