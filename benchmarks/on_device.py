"""Time of a sampling step, on a GPU by its own events: `nox -s bench -- --device cuda`.

SD1.5 at 512 px and SDXL at 1024 px, float16, batch 1 with guidance: no adapter, one prompt, one
with a mask, three, three with masks; each with and without torch.compile, and with `--peer` the old
pack's too. Prints the Markdown table of docs/measured.md. `--small` takes the same way with small
models in float32, so that it can be tried on a CPU.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoint_layouts import SD15, SDXL, UNet
from tools.comfyui import install as host

from . import budget, peer, report
from .full_size import Setup

FULL = {"SD1.5, 512 px": (SD15, 64), "SDXL, 1024 px": (SDXL, 128)}
SMALL = {
    "small SD1.5, 64 px": (replace(SD15, channels=32, context=64, heads=(4,) * 4), 8),
    "small SDXL, 64 px": (
        replace(SDXL, channels=32, context=64, depths=(0, 1, 2), heads=(2, 4, 8)),
        8,
    ),
}
WARM_UP = 2  # steps of a run that are not timed
ROWS = {
    "none": "no adapter",
    "one": "one prompt",
    "mask": "one prompt, masked",
    "three": "three prompts",
    "three_masks": "three prompts, masked",
}


class HostClock:
    """Seconds between moments, by the CPU, where an operation ends before the next begins."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def mark(self) -> None:
        self._times.append(time.perf_counter())

    def intervals(self) -> list[float]:
        return [end - begin for begin, end in pairwise(self._times)]


class DeviceClock:
    """Events in the GPU's own queue: nothing waits for the device while it is measured."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def intervals(self) -> list[float]:
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self._events)]


@dataclass(frozen=True)
class Plan:
    """What is measured, where and how often."""

    sizes: dict[str, tuple[UNet, int]]
    dtype: torch.dtype
    clock: type[HostClock | DeviceClock]
    backend: str  # of torch.compile
    steps: int
    rounds: int
    peer: Path | None = None


def plan(device: str, small: bool, rounds: int, peer: Path | None) -> Plan:
    """Choose sizes, precision and clock, and let the host compute on that device.

    Raises:
        ValueError: The device is a GPU, and torch finds none.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda or "no CUDA"
            raise ValueError(
                f"--device cuda needs a GPU that torch can use; torch {torch.__version__} (built "
                f"for {built}) finds {torch.cuda.device_count()}. Run it on a machine with one and "
                "a torch built for it, or take --device cpu --small to try the same measurement."
            )
        os.environ.setdefault(host.FLAGS_VARIABLE, "--use-pytorch-cross-attention")
    full = device == "cuda" and not small
    return Plan(
        SMALL if small else FULL,
        torch.float16 if full else torch.float32,
        DeviceClock if device == "cuda" else HostClock,
        "eager" if small else "inductor",
        steps=20 if full else WARM_UP + 3,
        rounds=rounds,
        peer=peer,
    )


def compiled(model: Any, backend: str) -> Any:
    """Take the steps of ComfyUI's TorchCompileModel, with any backend."""
    from comfy_extras import nodes_torch_compile as node

    clone = model.clone(disable_dynamic=True)
    options = {"guard_filter_fn": node.skip_torch_compile_dict}
    node.set_torch_compile_wrapper(model=clone, backend=backend, options=options)
    return clone


def step_seconds(setup: Setup, model: Any, plan: Plan) -> float:
    """Return the median of a model's sampling steps, after a run that is not timed."""
    found: list[float] = []
    for _ in range(1 + plan.rounds):
        clock = plan.clock()
        setup.sample(model, plan.steps, lambda *_, clock=clock: clock.mark())
        found.append(statistics.median(clock.intervals()[WARM_UP - 1 :]))
    return statistics.median(found[1:])


def measure(plan: Plan) -> dict[str, dict[str, float]]:
    """Return the figures of each column of the table: seconds a step, kernels, synchronisations."""
    columns: dict[str, dict[str, float]] = {}
    for title, (size, side) in plan.sizes.items():
        setup = Setup.build(size, side, plan.dtype)
        models = {"none": setup.model, **setup.variants()}
        counted = budget.measure(setup)
        if plan.peer:
            theirs = peer.variants(setup, plan.peer)
            counted |= peer.counts(setup, theirs)
            models |= {f"peer_{name}": model for name, model in theirs.items()}
        plain, traced = columns[title], columns[f"{title}, compiled"] = counted, {}
        for name, model in models.items():
            plain[name] = step_seconds(setup, model, plan)
            torch._dynamo.reset()  # what one model compiled, another would take for its own
            traced[name] = step_seconds(setup, compiled(model, plan.backend), plan)
            report.progress(f"{title}, {name}: {plain[name]:.4g} s, compiled {traced[name]:.4g} s")
    return columns


def table(columns: dict[str, dict[str, float]]) -> str:
    """Lay out the figures in Markdown: milliseconds a step, and their ratio to no adapter."""

    def milliseconds(figures: dict[str, float], name: str) -> str:
        if name not in figures:
            return "–"
        ratio = "" if name == "none" else f" ({figures[name] / figures['none']:.3f})"
        return f"{figures[name] * 1000:.2f}{ratio}"

    def count(figures: dict[str, float], name: str) -> str:
        return f"{figures[name]:.3g}" if name in figures else "–"

    measured = next(iter(columns.values()))
    rows: list[tuple[str, Callable[[dict[str, float], str], str], str]] = []
    for owner, said in (("", ""), ("peer_", "ComfyUI_IPAdapter_plus: ")):
        rows += [(owner + n, milliseconds, said + text) for n, text in ROWS.items()]
        rows += [
            (f"{owner}kernels_per_layer", count, f"{said}kernels added per layer and call"),
            (f"{owner}kernels_per_layer_mask", count, f"{said}the same with a mask"),
            (f"{owner}syncs_per_step", count, f"{said}synchronisations added per step"),
        ]
    lines = [["ms per step (ratio to no adapter)", *columns], ["---"] * (1 + len(columns))]
    for name, shown, text in rows:
        if name in measured:
            lines.append([text, *(shown(figures, name) for figures in columns.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(device: str, small: bool, rounds: int, peer: Path | None) -> None:
    """Measure, print the table and write output/bench-DEVICE.json."""
    columns = measure(plan(device, small, rounds, peer))
    report.write(columns, report.OUTPUT.with_name(f"bench-{device}.json"))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, ComfyUI {host.TESTED_VERSION}\n\n{table(columns)}")
