"""Make a folder part by part, and go on where it stopped."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ip_adapter_core.files.atomic import atomic

logger = logging.getLogger("comfyui_ip_adapter.tools")
_RECIPE, _TIMES = "recipe.json", "times.json"
Part = tuple[str, str, Callable[[Path], object]]
"""A part's name, its file or folder, and what writes it given a path."""


class RecipeError(ValueError):
    """A work folder holds parts of another build."""


class Stages:
    """The parts of one build in the folder `work`, made on `device`."""

    def __init__(self, work: Path, device: str) -> None:
        self.work, self.device = work, device

    def recipe(self) -> dict[str, Any]:
        """Return what was asked for, as JSON has it: a folder holds parts of one recipe only."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """List the parts in the order that makes them."""
        raise NotImplementedError

    def run(self) -> None:
        """Make every part that is not there, and note how long it took. Raises RecipeError."""
        self.work.mkdir(parents=True, exist_ok=True)
        path, ours = self.work / _RECIPE, json.dumps(self.recipe(), indent=1)
        if all(left.suffix == ".tmp" for left in self.work.iterdir()):  # of a write that was killed
            _write(path, ours)
        theirs = path.read_text(encoding="utf-8") if path.exists() else "no recipe at all"
        if theirs != ours:
            raise RecipeError(
                f"'{self.work}' holds parts of another build: {_RECIPE} has {theirs}; expected "
                f"{ours}. Give another folder with --work, or delete this one."
            )
        for name, target, make in self.parts():
            if (self.work / target).exists():
                logger.info("%s: there already", name)
                continue
            logger.info("%s …", name)
            begun = time.monotonic()
            unfinished = self.work / f"unfinished-{target}"
            try:
                make(unfinished)
            finally:  # an interrupted attempt took its time too
                self.note(name, time.monotonic() - begun)
            unfinished.rename(self.work / target)

    def note(self, name: str, seconds: float) -> None:
        """Add to a part's time, and note on what it was made."""
        times = self.times()
        times["seconds"][name] = times["seconds"].get(name, 0) + round(seconds)
        if (hardware := _hardware(self.device)) not in times["made_on"]:
            times["made_on"].append(hardware)
        _write(self.work / _TIMES, json.dumps(times, indent=1))

    def times(self) -> dict[str, Any]:
        """Return `made_on`, what made the parts, and the `seconds` that each took."""
        path = self.work / _TIMES
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        return {"made_on": [], "seconds": {}}


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _hardware(device: str) -> str:
    threads = f"{torch.get_num_threads()} CPU threads"
    return threads if device == "cpu" else f"{torch.cuda.get_device_name(device)}, {threads}"


def device(text: str) -> str:
    """Check the name of what trains."""
    if text not in ("cpu", "cuda"):
        told = f"{text}: expected cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU"
        raise argparse.ArgumentTypeError(told)
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"cuda: torch {torch.__version__} finds no GPU that it can use. Give cpu, or install "
            "PyTorch for your GPU."
        )
    return text
