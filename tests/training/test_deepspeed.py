"""DeepSpeed ZeRO-2: two processes with half the batch each follow one with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tools.comfyui.install import ROOT
from training import distributed as acceleration

# accelerate has DeepSpeed start on accelerators only; told of the backend, it starts on CPUs too.
ON_CPUS = """
import sys; sys.path.insert(0, {root!r})
from accelerate import PartialState
from training import launch, train
launch.begin = lambda patience=None: PartialState(cpu=False, backend="gloo")
train.main()
"""
OPTIONS = {
    **{"size": 64, "workers": 0, "log_with": "none", "save_every": 3, "learning_rate": 1e-3},
    **{"accumulation": 2, "clip_norm": 0.01, "ema": 0.5, "batch_size": 4},
}


def test_deepspeed_is_told_what_it_cannot_see(settings, monkeypatch):
    plugin = SimpleNamespace(deepspeed_config={"gradient_accumulation_steps": 1})
    made = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    monkeypatch.setattr(acceleration, "Accelerator", lambda **given: made)
    given = settings(batch_size=6, accumulation=3, clip_norm=0.5)
    assert acceleration.prepare_accelerator(given, "bf16") is made
    assert plugin.deepspeed_config == {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
    }


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_zero_2_follows_one_process(frozen, pictures, tmp_path, precision):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (tmp_path / "on_cpus.py").write_text(ON_CPUS.format(root=str(ROOT)))
    start = [str(tmp_path / "on_cpus.py")]
    given = {"base": frozen / "sd15", "image_encoder": frozen / "encoder", "data": pictures}
    split = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    zero = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # as accelerate launch leaves it
        "DS_ACCELERATOR": "cpu",
    }

    def train(name: str, how: list[str], variables: dict[str, str], **changes) -> dict:
        options = {**given, **OPTIONS, **changes, "out": tmp_path / name}
        arguments = [f"--{key}={value}" for key, value in options.items()]
        environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": precision, **variables}
        environment["OMP_NUM_THREADS"] = "1"
        subprocess.run([sys.executable, *how, *arguments], env=environment, check=True)
        path = Path(options["out"], "checkpoints", "step-0000006", "adapter.safetensors")
        return load_file(path) if path.exists() else {}

    one = {"ACCELERATE_USE_CPU": "true"}
    whole = train("one", [str(ROOT / "training" / "train.py")], one, batch_size=8, steps=6)
    straight = train("zero", split + start, zero, steps=6)
    train("resumed", split + start, zero, steps=3)
    resumed = train("resumed", split + start, zero, steps=6)
    first = load_file(tmp_path / "one" / "checkpoints" / "step-0000003" / "adapter.safetensors")

    def distance(a, b):
        return sum((a[key].float() - b[key].float()).square().sum() for key in a).sqrt()

    assert distance(straight, whole) < (1e-1 if precision == "bf16" else 2e-3) * distance(
        whole, first
    )
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
