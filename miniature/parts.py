"""A folder in which the parts of a build are made: each once, in order or side by side."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tools.comfyui.install import ROOT

logger = logging.getLogger("comfyui_ip_adapter.tools")
_RECIPE, _TIMES = "recipe.json", "times.json"


class RecipeError(ValueError):
    """A work folder holds parts of another build."""


class PartError(RuntimeError):
    """A part was not made."""


@dataclass(frozen=True)
class Part:
    """`make` writes the file or folder `target` of a work folder, given its unfinished path."""

    name: str
    target: str
    make: Callable[[Path], object]


Stage = Sequence[Part]
"""Parts that need those of the stages before, and nothing of each other; what takes longest comes
first."""


class Work(ABC):
    """The folder `work` of one recipe, and what is to be made in it; `hardware`: the name of what
    makes it, to be noted."""

    def __init__(self, work: Path, hardware: str) -> None:
        self.work, self.hardware = work, hardware

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """What was asked for, as JSON has it; nothing of another recipe is gone on with."""

    @abstractmethod
    def stages(self) -> Iterable[Stage]:
        """What is made, in order."""

    @abstractmethod
    def command(self, name: str) -> list[str]:
        """Makes the part of that name in a process of its own."""

    def begin(self) -> None:
        """Make the folder, which is of one seed and one recipe. Raises RecipeError if it holds
        parts of another."""
        self.work.mkdir(parents=True, exist_ok=True)
        path, ours = self.work / _RECIPE, json.dumps(self.recipe(), indent=1)
        if not any(self.work.iterdir()):
            path.write_text(ours, encoding="utf-8")
        theirs = path.read_text(encoding="utf-8") if path.exists() else "no recipe at all"
        if theirs != ours:
            raise RecipeError(
                f"'{self.work}' holds parts of another build: {_RECIPE} has {theirs}; expected "
                f"{ours}. Give another folder with --work, or delete this one."
            )

    def make(self, part: Part, beside_others: bool = False) -> None:
        """Make a part unless its file or folder is there, and note how long it took;
        `beside_others`: while other parts of its stage are made."""
        with FileLock(self.work / f"{part.target}.lock"):  # another process may be making it
            if (self.work / part.target).exists():
                logger.info("%s: there already", part.name)
                return
            logger.info("%s …", part.name)
            begun = time.monotonic()
            unfinished = self.work / f"unfinished-{part.target}"
            try:
                part.make(unfinished)
            finally:  # an interrupted attempt took its time too
                self.note(part.name, time.monotonic() - begun, beside_others)
            os.replace(unfinished, self.work / part.target)

    def note(self, name: str, seconds: float, beside_others: bool = False) -> None:
        """Note the time of a part that was made alone, or of parts that were made together. What
        one of the latter took, `beside_others`, is no time of its own."""
        with FileLock(self.work / f"{_TIMES}.lock"):
            times = self.times()
            kind = times["side_by_side" if beside_others else "seconds"]
            kind[name] = kind.get(name, 0) + round(seconds)
            if not beside_others and self.hardware not in times["made_on"]:
                times["made_on"].append(self.hardware)
            (self.work / _TIMES).write_text(json.dumps(times, indent=1), encoding="utf-8")

    def times(self) -> dict[str, Any]:
        """`made_on`: what made the parts. `seconds`: what was made alone or, under one name,
        together. `side_by_side`: of the latter, each."""
        path = self.work / _TIMES
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        return {"made_on": [], "seconds": {}, "side_by_side": {}}

    def seconds(self) -> int:
        """That all took."""
        return sum(self.times()["seconds"].values())

    def all(self) -> None:
        """Every part, each from those before. Raises RecipeError if `work` holds parts of another
        build, PartError if one of those that are made side by side failed."""
        self.begin()
        for stage in self.stages():
            if len(stage) > 1 and torch.get_num_threads() > 1:
                self.side_by_side(stage)
            else:
                for part in stage:
                    self.make(part)

    def only(self, name: str) -> None:
        """The part of that name, from those of the stages before, beside others of its stage."""
        self.begin()
        (part,) = (part for stage in self.stages() for part in stage if part.name == name)
        self.make(part, beside_others=True)

    def side_by_side(self, stage: Stage) -> None:
        """Make what is missing of a stage, each part in a process of its own, which share the
        processors: two small trainings take less time so than one after the other."""
        names = [part.name for part in stage if not (self.work / part.target).exists()]
        if not names:
            return
        processors = torch.get_num_threads()
        jobs = min(len(names), processors)
        threads = processors // jobs
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

        def run(name: str) -> int:
            return subprocess.run(self.command(name), cwd=ROOT, env=environment).returncode

        begun = time.monotonic()
        try:
            with ThreadPoolExecutor(jobs) as pool:
                codes = dict(zip(names, pool.map(run, names), strict=True))
        finally:
            self.note(" + ".join(names), time.monotonic() - begun)
        if failed := [name for name, code in codes.items() if code]:
            raise PartError(
                f"{', '.join(failed)}: not made, see above for why. What was made is kept; the "
                "same command goes on from there."
            )
