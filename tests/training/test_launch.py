"""Several processes, as accelerate, torchrun and DeepSpeed start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tools.comfyui.install import ROOT
from training import distributed
from training.config import TrainConfig
from training.errors import TrainingError
from training.history import History
from training.trainer import Trainer

SCRIPT = ROOT / "training" / "train.py"
# accelerate has DeepSpeed start on accelerators only; told of the backend, it starts on CPUs too.
ON_CPUS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from accelerate import PartialState
from training import distributed, train
distributed.begin = lambda _: PartialState(cpu=False, backend="gloo")
train.main()
"""
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_processes")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
AVERAGED = {"gradient_accumulation_steps": 2, "use_ema": True, "ema_decay": 0.5}
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a launcher's end isn't told")
pytestmark = pytest.mark.usefixtures("arrow")


@pytest.fixture
def launch(tmp_path, tmp_path_factory):
    """Start train.py with these settings, in so many processes of a launcher."""

    def launch(given, launcher, processes, script=SCRIPT, variables=None, **options):
        defaults = {field.name: field.default for field in fields(TrainConfig)}
        changed = {n: v for n, v in vars(given).items() if v != defaults[n]}
        return subprocess.Popen(
            [
                *(sys.executable, "-m", *launcher, str(processes), str(script)),
                *(f"--{name}={value}" for name, value in changed.items()),
            ],
            env={
                **os.environ,
                "HF_DATASETS_CACHE": str(tmp_path_factory.getbasetemp() / "datasets"),
                "OMP_NUM_THREADS": "1",
                **(variables or {}),
            },
            cwd=tmp_path,
            **options,
        )

    return launch


def saved(settings, step, name="model"):
    return load_file(Path(settings.output_dir, f"checkpoints/step-{step:07}/{name}.safetensors"))


@pytest.mark.parametrize("start", ["forked", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_two_processes_follow_one(settings, tmp_path, train, two_ranks, launch, start):
    """With half the batch each; clipping, accumulation and the average included."""
    more = {**AVERAGED, "max_grad_norm": 0.1, "i_drop_rate": 0.3, "t_drop_rate": 0.3}
    one = settings(max_train_steps=6, **more)
    trainer = Trainer(one)
    before = {key: value.clone() for key, value in trainer.sampled().state_dict().items()}
    trainer.train()
    two = replace(one, train_batch_size=2, output_dir=str(tmp_path / "two"))
    if start == "forked":
        two_ranks(lambda: Trainer(two).train())
    else:
        assert launch(two, TORCHRUN, 2).wait() == 0
    assert not (tmp_path / "two" / "checkpoints" / "step-0000012").exists()
    losses, theirs = ((History(Path(x.output_dir), 6).series()["loss"]) for x in (one, two))
    assert theirs == pytest.approx(losses, rel=1e-3)
    assert len(Path(two.output_dir, "metrics.jsonl").read_text().splitlines()) == 6
    expected = saved(one, 6)
    for key, value in saved(two, 6).items():
        moved = (expected[key] - before[key]).norm()
        assert moved > 0
        assert (value - expected[key]).norm() < 1e-3 * moved, key
    # It goes on in one process too: what a sample is does not depend on how many there are.
    train(replace(one, max_train_steps=7, output_dir=two.output_dir))
    assert saved(two, 7)


@linux
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
    wait_for(ready.exists)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    wait_for(told.exists)


def wait_for(arrived, seconds=30):
    until = time.monotonic() + seconds
    while not arrived():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.nightly
@linux
@pytest.mark.parametrize("launcher, processes", [(ACCELERATE, 1), (TORCHRUN, 2)])
def test_a_scheduler_that_ends_the_launcher(settings, tmp_path, launch, launcher, processes):
    given = settings(max_train_steps=1_000_000, checkpointing_steps=1_000_000)
    log = tmp_path / "log"
    with log.open("w") as file:
        process = launch(given, launcher, processes, stdout=file, stderr=file)
        wait_for(lambda: ": loss " in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        process.terminate()
        process.wait(60)
        newest = Path(given.output_dir, "ip-adapter.safetensors")
        wait_for(newest.exists, 60)
    assert load_file(newest), log.read_text()


def test_several_processes_on_cpus_are_refused(monkeypatch, accelerate_anew):
    """With the variables that `accelerate launch --cpu --num_processes 2` sets."""
    where = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    for name, value in {**where, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="torchrun --nproc_per_node N"):
        distributed.begin()


@pytest.mark.nightly
def test_accelerate_launch_of_several_processes_on_cpus(settings, launch):
    process = launch(settings(), ACCELERATE, 2, stderr=subprocess.PIPE, text=True)
    assert "torchrun --nproc_per_node N" in process.communicate()[1]
    assert process.returncode != 0


def test_deepspeed_is_told_what_it_cannot_see(settings, monkeypatch):
    plugin = SimpleNamespace(deepspeed_config={"gradient_accumulation_steps": 1})
    made = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    monkeypatch.setattr(distributed, "Accelerator", lambda **given: made)
    given = settings(train_batch_size=6, gradient_accumulation_steps=3, max_grad_norm=0.5)
    assert distributed.make_accelerator(given, "bf16") is made
    assert plugin.deepspeed_config == {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
    }


@pytest.mark.nightly
@pytest.mark.parametrize("precision, tolerance", [("no", 2e-3), ("bf16", 1e-1)])
def test_zero_2_follows_one_process(settings, tmp_path, launch, precision, tolerance):
    """Two processes with half the batch each follow one with the whole batch."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (tmp_path / "on_cpus.py").write_text(ON_CPUS)
    launched = {"ACCELERATE_MIXED_PRECISION": precision}
    zero = {
        **launched,
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # as accelerate launch leaves it
        "DS_ACCELERATOR": "cpu",
    }

    def trained(name, steps, **changes):
        out = {"output_dir": str(tmp_path / name), "max_train_steps": steps}
        given = settings(checkpointing_steps=3, max_grad_norm=0.01, **AVERAGED, **out, **changes)
        if name == "one":
            variables = {**launched, "ACCELERATE_USE_CPU": "true"}
            process = launch(given, TORCHRUN, 1, variables=variables)
        else:
            process = launch(given, TORCHRUN, 2, tmp_path / "on_cpus.py", zero)
        assert process.wait() == 0
        return given

    one, straight = trained("one", 6, train_batch_size=8), trained("zero", 6)
    trained("resumed", 3)
    resumed = saved(trained("resumed", 6), 6, "adapter")
    first, whole, straight = (saved(*at, "adapter") for at in ((one, 3), (one, 6), (straight, 6)))

    def distance(a, b):
        return sum((a[key].float() - b[key].float()).square().sum() for key in a).sqrt()

    assert distance(straight, whole) < tolerance * distance(whole, first)
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
