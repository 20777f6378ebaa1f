"""What training costs: `nox -s bench` measures it with the rest.

python -m benchmarks.training [--rounds 20]   alone, without ComfyUI; written to output/bench.json
python -m benchmarks.training --set FOLDER    speed and memory on the drawings of
                                              `python -m training.recipes.emoji.drawings`

On models whose work is divided as SD1.5's is (`proportions`), in float32 on a CPU. Steps are timed
as `beside_training` says; the median ratio counts.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ip_adapter_core.files import adapter_file as checkpoint
from tests.support import image_folders
from tools.comfyui.install import ROOT
from training import cache
from training.config import TrainConfig
from training.loss import Batch
from training.trainer import Trainer
from training.unet import new_adapter

from . import beside_training, proportions, report, rows
from .beside_training import NOT_TIMED, one_thread, seconds, side_by_side
from .reference_loop import Reference

LIMITS: dict[str, float | str] = {
    "training_cache_speedup": "≥ 1.5",
    "training_loop_overhead": 1.05,
    "training_waiting_for_data": 0.05,  # a busy machine makes it wait for a processor, too
    "training_checkpoint_bytes": 45e6,  # two bytes for each of 22.3 million weights
    "training_rss_growth": 32 * 2**20,  # 33 bytes a row: its numbers, but not its texts
}
BATCH, PICTURES, WORKERS, PEAK_STEPS = 8, 128, 2, 12


def measure(rounds: int, drawings: Path | None = None) -> dict[str, float]:
    """Measure all of the figures above and the memory, or what depends on the set of drawings."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, one_thread():
        folder = Path(name)
        make(folder, drawings)
        measures: dict[str, Callable[[], float]] = {
            "training_cache_speedup": lambda: cache_speedup(folder, rounds),
            "training_peak_rss": lambda: peak(folder, "cache"),
            "training_peak_rss_reference": lambda: peak(folder, "reference"),
        }
        if not drawings:
            measures |= {
                "training_loop_overhead": lambda: loop_overhead(folder, rounds),
                "training_waiting_for_data": lambda: waiting_for_data(folder, rounds),
                "training_checkpoint_bytes": lambda: checkpoint_bytes(folder),
                "training_rss_growth": lambda: rows.growth(folder / "rows"),
            }
        for figure, value in measures.items():
            found[figure] = value()
            report.progress(f"{figure}: {found[figure]:.5g}")
    return found


def make(folder: Path, drawings: Path | None = None) -> None:
    """Make `base`, `encoder`, `pictures` (or link those of the drawings), `cache` and `weights`.

    Raises:
        ValueError: The models' work is not divided as SD1.5's.
    """
    operations = proportions.counted()
    for name, share in proportions.SD15.items():
        found = operations[name] / sum(operations.values())
        if abs(found - share) > proportions.TOLERANCE:
            raise ValueError(f"{name} is {found:.1%} of a step; in SD1.5 it is {share:.1%}.")
    proportions.save(folder)
    side, pictures = proportions.SIZE, folder / "pictures"
    if drawings:
        pictures.mkdir()
        for hand in (drawings / "pictures").iterdir():
            (pictures / hand.name).symlink_to(hand.resolve(), target_is_directory=True)
        shutil.copy(drawings / "plain.jsonl", pictures / "metadata.jsonl")
    else:
        image_folders.with_metadata(pictures, PICTURES, [(side * 5 // 4, side), (side, side)])
    fill_cache(folder)


def fill_cache(folder: Path) -> None:
    """Make `cache` of `pictures`, and `weights` that both loops start from."""
    wanted = cache.CacheConfig(
        pretrained_model_name_or_path=str(folder / "base"),
        image_encoder_path=str(folder / "encoder"),
        train_data_dir=str(folder / "pictures"),
        output_dir=str(folder / "cache"),
        resolution=proportions.SIZE,
        dataloader_num_workers=0,
    )
    with patch.object(datasets.config, "HF_DATASETS_CACHE", folder / "datasets"):
        cache.make(wanted)
    save_file(Trainer(config(folder)).sampled().state_dict(), folder / "weights.safetensors")


def config(folder: Path, **changes: Any) -> TrainConfig:
    """Of a run from the cache."""
    given = {
        "feature_cache_dir": str(folder / "cache"),
        "resolution": proportions.SIZE,
        "train_batch_size": BATCH,
    }
    return beside_training.config(folder, **(given | changes))


def loop_overhead(folder: Path, rounds: int) -> float:
    """Ratio of a step of train.py's loop to bare forward, backward and optimizer."""
    pairs = side_by_side(config(folder, max_train_steps=rounds + NOT_TIMED), bare_step)
    return statistics.median(ours / bare for ours, bare in pairs)


def bare_step(trainer: Trainer, batch: Batch) -> float:
    """Return the seconds of forward, backward and optimizer by torch alone, on the loop's batch."""
    loss = trainer.loss
    noisy_latents, target = loss.add_noise(loss.sample_latents(batch), batch)
    features, states, _ = loss.drop_conditions(batch)
    features, states = features.float(), states.float()
    adapter, optimizer, unet = trainer.sampled(), trainer.optimizer.optimizer, trainer.unet

    def step() -> None:
        given = {"ip_hidden_states": adapter(features)}
        timestep = batch["timestep"]
        predicted = unet(noisy_latents, timestep, states, cross_attention_kwargs=given).sample
        torch.nn.functional.mse_loss(predicted, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds(step)


def cache_speedup(folder: Path, rounds: int) -> float:
    """Ratio of a step of the reference's loop to one of train.py's from a cache."""
    given = config(folder, max_train_steps=rounds + NOT_TIMED)
    loop = reference_loop(folder, given)
    pairs = side_by_side(given, lambda *_: seconds(loop.step))
    return statistics.median(reference / ours for ours, reference in pairs)


def reference_loop(folder: Path, given: TrainConfig) -> Reference:
    return Reference(given, folder / "pictures", load_file(folder / "weights.safetensors"))


def peak(folder: Path, loop: str) -> int:
    """Return the most bytes that a process of its own has held after some steps of a loop."""
    command = [sys.executable, "-m", f"{__package__}.training", "--peak", loop, str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def run_for_peak(loop: str, folder: Path) -> int:
    """Take some steps from the cache or as the reference does; return the peak in bytes."""
    given = config(folder, max_train_steps=PEAK_STEPS)
    if loop == "cache":
        Trainer(given).train()
    else:
        reference = reference_loop(folder, given)
        for _ in range(PEAK_STEPS):
            reference.step()
    return peak_of_this_process()


def peak_of_this_process() -> int:
    """Return the most bytes of memory that this process has held.

    Not getrusage's on Linux: there a program begins at the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def waiting_for_data(folder: Path, rounds: int) -> float:
    """Share of the time that the loop logs as waiting for its workers, once it is under way."""
    told: list[dict[str, float]] = []

    def log(accelerator: Accelerator, values: dict[str, float], **_: Any) -> None:
        told.append(values)

    with patch.object(Accelerator, "log", log):
        steps = {"max_train_steps": 2 * rounds, "logging_steps": rounds}
        Trainer(config(folder, dataloader_num_workers=WORKERS, **steps)).train()
    return told[-1]["waiting_for_data"]


def checkpoint_bytes(folder: Path) -> int:
    """Size of the file of an adapter for SD1.5's own UNet, whose weights alone are made."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        adapter = new_adapter(unet, "base", feature_dim=1024)
    path = folder / "adapter.safetensors"
    weights = {name: torch.zeros(w.shape) for name, w in adapter.state_dict().items()}
    checkpoint.save(weights, path, {})
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each kind")
    parser.add_argument("--set", type=Path, help="folder of drawings to train on")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        with one_thread():
            print(run_for_peak(given.peak[0], Path(given.peak[1])))
        return
    results = measure(given.rounds, given.set)
    report.write({**report.read(), **results})
    report.table(results, LIMITS)


if __name__ == "__main__":
    main()
