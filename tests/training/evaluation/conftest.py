"""Models, adapters and COCO for evaluations, all small, and one evaluation run as a command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.support import image_folders
from tests.support import small_models as small
from tools.comfyui.install import ROOT
from training.evaluate import EvaluationConfig, evaluate
from training.sampling import Sampler

PICTURES, SAMPLES = 5, 2


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


@pytest.fixture(scope="session")
def measured(folder):
    """Settings of an evaluation that is done."""
    settings = EvaluationConfig(
        pretrained_model_name_or_path=str(folder / "base"),
        image_encoder_path=str(folder / "encoder"),
        ip_adapter_path=(str(folder / "one.safetensors"), str(folder / "two.bin")),
        eval_data_dir=str(folder / "coco"),
        output_dir=str(folder / "measured"),
        clip_model=str(folder / "clip"),
        scale=(0.5, 1.0),
        num_images_per_prompt=SAMPLES,
        num_inference_steps=2,
        guidance_scale=3.0,
        batch_size=4,  # two rows at once
        dtype="float32",
    )
    evaluate(settings)
    return settings


@pytest.fixture
def settings(measured, tmp_path):
    """The same settings, with nothing done."""
    return replace(measured, output_dir=str(tmp_path / "out"))


@pytest.fixture
def done(measured, settings):
    """Settings of an evaluation that is done, in a folder of this test's own."""
    shutil.copytree(measured.output_dir, settings.output_dir)
    return settings


@pytest.fixture
def start():
    """Starts `evaluate.py` with some settings, in some processes."""

    def start(settings, processes=1):
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(several if processes > 1 else [])]
        command.append(str(ROOT / "training" / "evaluate.py"))
        for name, value in vars(settings).items():
            if value not in (None, ""):
                values = value if isinstance(value, tuple) else (value,)
                command += [f"--{name}", *map(str, values)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        return subprocess.Popen(command, env=environment)

    return start


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
