"""Memory of a training process by the number of its rows.

What is its own, not pages of the mapped table, which the system takes back whenever it wants to.

python -m benchmarks.rows FOLDER   bytes of a process that trains on FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support import image_folders, small_models
from tools.comfyui.install import ROOT
from training.trainer import Trainer

from .beside_training import config

FEW, MANY = 1_000, 1_000_000
PICTURES, BATCHES = 4, 48


def growth(folder: Path) -> int:
    """Return the bytes by which a process with `MANY` rows is larger than one with `FEW`.

    All of them name the same images.
    """
    small_models.base(folder / "base", "sd15")
    small_models.image_encoder(folder / "encoder")
    for number in range(PICTURES):
        image_folders.image(number).save(folder / f"{number}.png")
    return measured(folder, MANY) - measured(folder, FEW)


def measured(folder: Path, rows: int) -> int:
    """Return the bytes of a process of its own that trains on so many rows."""
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(
            f'{{"file_name": "{row % PICTURES}.png", "text": "caption of picture {row}"}}\n'
            for row in range(rows)
        )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
    command = [sys.executable, "-m", f"{__package__}.rows", str(folder)]
    found = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return int(found.stdout.split()[-1])


def own_memory() -> int:
    """Return the bytes of this process that lie in no file.

    Linux tells them apart; elsewhere what no other process shares has to do.
    """
    memory = psutil.Process().memory_full_info()
    return memory.rss - memory.shared if psutil.LINUX else memory.uss


if __name__ == "__main__":
    given = Path(sys.argv[1])
    settings = config(given, train_data_dir=str(given), resolution=64, report_to="none")
    trainer = Trainer(settings)
    for _ in range(BATCHES):
        next(trainer.batches)
    print(own_memory())
