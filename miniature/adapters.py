"""The miniature's adapters, trained by the same two scripts as anyone's are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from miniature.scenes import references, render, scenes, to_pil
from tools.comfyui.install import ROOT

SIDE = 64
ONE_GPU = Path(__file__).with_name("one_gpu.yaml")
REFERENCE_STREAM = 1 << 20  # added to the seed: shapes drawn anew are of a stream of their own
RESAMPLER = {"resampler_dim": 192, "resampler_depth": 2, "lr_warmup_steps": 100}
"""Of the fine-grained variant's query network; the published ones' would take 58 MB. It needs a
smaller learning rate than the base adapter (see build.STEPS): at 2e-3, 1,000 steps destroy what
even an untrained network's tokens tell of where a shape lies (a linear fit of x and y: R² 0.41 and
0.54 before, 0.02 and 0.06 after)."""

OPTIONS: dict[str, Any] = {
    "train_batch_size": 16,
    "learning_rate": 2e-3,
    "max_grad_norm": 1.0,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "debiased_estimation_loss": True,
    "t_drop_rate": 0.35,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "checkpointing_steps": 1000,
    "checkpoints_total_limit": 1,
}
"""Where they differ from the paper's: a short run on a small set. The manifest has them too, as
part of what tells a build's recipe."""


def write_images(folder: Path, seed: int, count: int) -> None:
    """Write images of the stream `seed`, captions that name the shape, and references."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for start in range(0, count, 250):
        targets = scenes(seed, min(250, count - start), start)
        others = references(targets, seed + REFERENCE_STREAM, start)
        rows = zip(render(targets, SIDE), render(others, SIDE), targets.captions, strict=True)
        for number, (target, other, caption) in enumerate(rows, start):
            names = f"{number:05}.png", f"{number:05}-reference.png"
            for name, image in zip(names, (target, other), strict=True):
                to_pil(image).save(folder / name)
            line = {"file_name": names[0], "text": caption, "reference_file_name": names[1]}
            lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def cache(
    base: Path, encoder: Path, images: Path, out: Path, device: str = "cpu", **options: Any
) -> None:
    """Store what the frozen parts give of all images, for both kinds of adapter."""
    _launch(
        "training/cache.py",
        device,
        pretrained_model_name_or_path=base,
        image_encoder_path=f"open_clip:{encoder}",
        train_data_dir=images,
        output_dir=out,
        resolution=SIDE,
        features="both",
        dtype="float32",
        batch_size=125,
        dataloader_num_workers=0,
        **options,
    )


def train(
    variant: str,
    base: Path,
    encoder: Path,
    cached: Path,
    out: Path,
    steps: int,
    device: str = "cpu",
    mixed_precision: str = "no",
    **options: Any,
) -> Path:
    """Train an adapter of that variant on `device`, cpu or cuda. Returns its file."""
    if variant == "plus":
        options = RESAMPLER | options
    _launch(
        "training/train.py",
        device,
        pretrained_model_name_or_path=base,
        image_encoder_path=f"open_clip:{encoder}",
        feature_cache_dir=cached,
        output_dir=out,
        variant=variant,
        mixed_precision=mixed_precision,
        max_train_steps=steps,
        **(OPTIONS | options),
    )
    return out / "ip-adapter.safetensors"


def _launch(script: str, device: str, **options: Any) -> None:
    given: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        given += [f"--{name}", *map(str, values)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launcher += ["--cpu"] if device == "cpu" else ["--config_file", str(ONE_GPU)]
    subprocess.run([*launcher, script, *given], cwd=ROOT, check=True)
