"""Sampling time with image prompts over sampling time without, at SD1.5's full size.

Interleaved runs of one step with guidance, 512 px, in CPU seconds of the whole process; each
run is divided by the mean of the plain runs just before and after it, and the median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .world import sample, thirds

SIZE = 64


def cpu_seconds(model: Any) -> float:
    start = time.process_time()
    sample(model, 1, SIZE)
    return time.process_time() - start


def variants(model: Any, apply: Callable[..., Any], prefix: str = "") -> dict[str, Any]:
    """Models to time, `apply` once or in a row: one prompt, one with a mask, three, three with
    masks."""
    masks = thirds()

    def in_a_row(*of: torch.Tensor | None) -> Any:
        patched = model
        for mask in of:
            patched = apply(patched, mask=mask)
        return patched

    return {
        f"{prefix}ratio_one": in_a_row(None),
        f"{prefix}ratio_mask": in_a_row(masks[0]),
        f"{prefix}ratio_three": in_a_row(None, None, None),
        f"{prefix}ratio_three_masks": in_a_row(*masks),
    }


def measure(
    plain: Any, models: dict[str, Any], rounds: int, report: Callable[[str], None]
) -> dict[str, float]:
    """Median ratio of each model's CPU time to the plain model's."""
    ratios: dict[str, list[float]] = {name: [] for name in models}
    cpu_seconds(plain)  # warm-up
    before = cpu_seconds(plain)
    for number in range(rounds):
        for name, model in models.items():
            took = cpu_seconds(model)
            after = cpu_seconds(plain)
            ratios[name].append(2 * took / (before + after))
            before = after
        report(f"round {number + 1} of {rounds}: " + _medians(ratios))
    return {name: statistics.median(values) for name, values in ratios.items()}


def _medians(ratios: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {statistics.median(v):.4f}" for name, v in ratios.items())
