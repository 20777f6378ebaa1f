"""`metrics.jsonl`: what a run measured, a line at a time, and how long it took."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


class History(GeneralTracker):
    """The tracker that every run has: a line for each call of `accelerator.log`.

        {"step": 50, "seconds": 81.3, "loss": 0.1234, "learning_rate": 0.0001, …}

    `seconds`: how long the run has trained until then, all its starts together. Once `resume` has
    cut off what came after the last checkpoint, a resumed run writes the lines of one that never
    stopped, times excepted.
    """

    name, requires_logging_directory = "history", False

    def __init__(self, output_dir: Path, steps: int) -> None:
        super().__init__()
        self.path, self.steps = output_dir / FILE, steps
        self._first, self._before, self._since = 0, 0.0, time.perf_counter()

    @property
    def tracker(self) -> Path:
        """The file, as accelerate asks a tracker for what it writes to."""
        return self.path

    def resume(self, step: int) -> None:
        """Keep what was logged until the checkpoint of `step`; nothing, if there is none (0)."""
        kept = 0
        if step:
            self._first = step
            for end, record in self._records():
                if record["step"] > step:
                    break
                kept, self._before = end, record["seconds"]
        if self.path.exists():
            os.truncate(self.path, kept)

    def begin(self) -> None:
        """Estimate what is left from what happens from now on: the first step begins."""
        self._before, self._since = self.seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long the run has trained so far."""
        return self._before + time.perf_counter() - self._since

    def seconds_left(self, step: int) -> float | None:
        """Estimate the time after `step` by what this start's steps took; None before any."""
        done, ahead = step - self._first, max(0, self.steps - step)
        if not done and ahead:
            return None
        return (self.seconds - self._before) / max(1, done) * ahead

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append a line; one that cannot be written is reported in the log."""
        if not values or step is None:
            return
        end = self.path.stat().st_size if self.path.exists() else 0
        record = {"step": step, "seconds": round(self.seconds, 3), **values}
        line = json.dumps(record, default=float)  # of a tensor, a NumPy number
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # a full disk must not end a training
            logger.error("'%s' could not be written: %s", self.path, error)
            with suppress(OSError):
                os.truncate(self.path, end)  # a part of a line would hide those after it

    def series(self) -> dict[str, dict[int, float]]:
        """Read the finite numbers that were logged: of each name, by step."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for _, record in self._records():
            step = record.pop("step")
            del record["seconds"]
            for name, value in record.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    found[name][step] = value
        return dict(found)

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each line, with where it ends; until one that a kill or a crash has left torn."""
        end = 0
        with suppress(FileNotFoundError, ValueError), self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield end, json.loads(line)
