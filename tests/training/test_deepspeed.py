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
from training import distributed

# accelerate has DeepSpeed start on accelerators only; told of the backend, it starts on CPUs too.
ON_CPUS = """
import sys; sys.path.insert(0, {root!r})
from accelerate import PartialState
from training import distributed, train
distributed.begin = lambda _: PartialState(cpu=False, backend="gloo")
train.main()
"""
OPTIONS = {
    **{
        "resolution": 64,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "checkpointing_steps": 3,
        "learning_rate": 1e-3,
    },
    **{
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.01,
        "use_ema": True,
        "ema_decay": 0.5,
        "train_batch_size": 4,
    },
}


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
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_zero_2_follows_one_process(frozen, pictures, tmp_path, precision):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (tmp_path / "on_cpus.py").write_text(ON_CPUS.format(root=str(ROOT)))
    start = [str(tmp_path / "on_cpus.py")]
    given = {
        "pretrained_model_name_or_path": frozen / "sd15",
        "image_encoder_path": frozen / "encoder",
        "train_data_dir": pictures,
    }
    split = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    zero = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # as accelerate launch leaves it
        "DS_ACCELERATOR": "cpu",
    }

    def train(name: str, how: list[str], variables: dict[str, str], **changes) -> dict:
        options = {**given, **OPTIONS, **changes, "output_dir": tmp_path / name}
        arguments = [f"--{key}={value}" for key, value in options.items()]
        environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": precision, **variables}
        environment["OMP_NUM_THREADS"] = "1"
        subprocess.run([sys.executable, *how, *arguments], env=environment, check=True)
        path = Path(options["output_dir"], "checkpoints", "step-0000006", "adapter.safetensors")
        return load_file(path) if path.exists() else {}

    one = {"ACCELERATE_USE_CPU": "true"}
    whole = train(
        "one", [str(ROOT / "training" / "train.py")], one, train_batch_size=8, max_train_steps=6
    )
    straight = train("zero", split + start, zero, max_train_steps=6)
    train("resumed", split + start, zero, max_train_steps=3)
    resumed = train("resumed", split + start, zero, max_train_steps=6)
    first = load_file(tmp_path / "one" / "checkpoints" / "step-0000003" / "adapter.safetensors")

    def distance(a, b):
        return sum((a[key].float() - b[key].float()).square().sum() for key in a).sqrt()

    assert distance(straight, whole) < (1e-1 if precision == "bf16" else 2e-3) * distance(
        whole, first
    )
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
