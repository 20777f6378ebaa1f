"""Sampling time with image prompts over sampling time without, on a CPU.

Interleaved runs of one step with guidance, in CPU seconds of the whole process; each run is
divided by the mean of the plain runs just before and after it, and the median counts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from . import report
from .full_size import Setup


def measure(setup: Setup, models: dict[str, Any], rounds: int) -> dict[str, float]:
    """Return the median ratio of each model's CPU time to the plain model's."""

    def cpu_seconds(model: Any) -> float:
        start = time.process_time()
        setup.sample(model)
        return time.process_time() - start

    ratios: dict[str, list[float]] = {name: [] for name in models}
    cpu_seconds(setup.model)  # warm-up
    before = cpu_seconds(setup.model)
    for number in range(rounds):
        for name, model in models.items():
            took = cpu_seconds(model)
            after = cpu_seconds(setup.model)
            ratios[name].append(2 * took / (before + after))
            before = after
        medians = ", ".join(f"{name} {statistics.median(v):.4f}" for name, v in ratios.items())
        report.progress(f"round {number + 1} of {rounds}: {medians}")
    return {name: statistics.median(values) for name, values in ratios.items()}
