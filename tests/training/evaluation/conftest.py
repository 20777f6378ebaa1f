"""Models, adapters and COCO for evaluations, all small, and one evaluation run as a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import image_folders
from tests.support import small_models as small
from training.evaluate import EvaluationConfig
from training.sampling import Sampler

ROOT = Path(__file__).resolve().parents[3]
PICTURES, SAMPLES = 5, 2
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Models, adapters as .safetensors and as .bin, and COCO."""
    path = tmp_path_factory.mktemp("evaluation")
    small.base(path / "base", "sd15", levels=2)
    small.image_encoder(path / "encoder")
    small.clip(path / "clip")
    image_folders.coco(path / "coco", PICTURES)
    save_file(small.adapter("sd15", "base").state_dict(), path / "one.safetensors")
    sections: dict = {"image_proj": {}, "ip_adapter": {}}
    for key, value in small.adapter("sd15", "plus", seed=9).state_dict().items():
        section, name = key.split(".", 1)
        sections[section][name] = value
    torch.save(sections, path / "two.bin")
    return path


@pytest.fixture
def settings(folder, tmp_path):
    return EvaluationConfig(
        pretrained_model_name_or_path=str(folder / "base"),
        image_encoder_path=str(folder / "encoder"),
        ip_adapter_path=(str(folder / "one.safetensors"), str(folder / "two.bin")),
        eval_data_dir=str(folder / "coco"),
        output_dir=str(tmp_path / "out"),
        clip_model=str(folder / "clip"),
        scale=(0.5, 1.0),
        num_images_per_prompt=SAMPLES,
        num_inference_steps=2,
        guidance_scale=3.0,
        batch_size=4,  # two rows at once
        dtype="float32",
    )


@pytest.fixture(scope="session")
def start(folder):
    """Starts `evaluate.py` with the settings of `settings`, in some processes."""

    def started(out, processes=1):
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        given = {
            "pretrained_model_name_or_path": "base",
            "image_encoder_path": "encoder",
            "eval_data_dir": "coco",
            "clip_model": "clip",
        }
        options = [f"--{name}={folder / value}" for name, value in given.items()]
        options += [f"--output_dir={out}", f"--num_images_per_prompt={SAMPLES}"]
        options += ["--scale", "0.5", "1.0", "--num_inference_steps=2", "--guidance_scale=3.0"]
        options += ["--batch_size=4", "--dtype=float32", "--ip_adapter_path"]
        options += [str(folder / "one.safetensors"), str(folder / "two.bin")]
        script = [*(several if processes > 1 else []), str(ROOT / "training/evaluate.py")]
        return subprocess.Popen([sys.executable, *script, *options], env=ENVIRONMENT)

    return started


@pytest.fixture(scope="session")
def straight(start, tmp_path_factory):
    """results.json of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight")
    assert start(out).wait() == 0
    return (out / "results.json").read_bytes()


@pytest.fixture
def drawn(monkeypatch):
    """How many pictures were asked for, call by call."""
    counts = []
    draw = Sampler.draw

    def counted(self, adapter, prompts):
        counts.append(len(prompts))
        return draw(self, adapter, prompts)

    monkeypatch.setattr(Sampler, "draw", counted)
    return counts
