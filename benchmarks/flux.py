"""What an image prompt adds to a block of Flux, counted as for UNets: its depth, few channels."""

from __future__ import annotations

import gc
import importlib
from dataclasses import dataclass
from typing import Any

import torch

from tools.comfyui import install as host

from . import budget
from .full_size import Setup, thirds

KINDS = ("xlabs", "instantx")
LIMITS = {
    f"flux_{kind}_{name}": limit
    for kind, limits in {
        # Attention, its heads side by side, one addition; with InstantX's the text's rows of a
        # double block are put in front of the picture's again.
        "xlabs": {"kernels_per_block": 3.2, "kernels_per_block_mask": 3.5},
        "instantx": {"kernels_per_block": 3.5, "kernels_per_block_mask": 3.7},
    }.items()
    for name, limit in {
        **limits,
        "syncs_per_step": 0,
        "kernels_outside_window": 0,
        "resident_adapter_parameters": 0,
        "rows_after_the_run": 0,
    }.items()
}


@dataclass(frozen=True)
class FluxSetup(Setup):
    """The same for a Flux of few channels."""

    @torch.no_grad()
    def sample(self, model: Any, steps: int = 1, after_step: Any = None) -> torch.Tensor:
        """Sample with Euler and true guidance over two conditionings."""
        made: torch.Tensor = self.size.sample(  # type: ignore[attr-defined]
            model, cfg=3.0, size=self.side, batch=1, at=[i / (steps + 1) for i in range(steps)]
        )
        return made


def build(kind: str, size: Any = None) -> FluxSetup:
    """Boot the host and make a Flux with an adapter of that kind, as deep as the real one."""
    host.boot(host.require())
    host.load_pack()
    flux: Any = importlib.import_module("tests.sampling.flux")
    size = size or flux.REAL_DEPTH
    model, adapter = flux.model(size), flux.adapter(flux.FILES[kind](size))
    return FluxSetup(flux, 16, model, adapter, flux.images())


def counts(setup: FluxSetup) -> dict[str, float]:
    """Count what a prompt adds to the blocks where its format acts."""
    settings: list[dict[str, Any]] = [{}, {"mask": thirds()[0]}, {"start_at": 1.0, "end_at": 1.0}]
    models = [setup.apply(setup.model, **given) for given in settings]
    *within, (outside, _) = budget.added(setup, *models)
    one, mask = (kernels / len(setup.adapter.spec.layer_dims) for kernels, _ in within)
    return {
        "kernels_per_block": one,
        "kernels_per_block_mask": mask,
        "syncs_per_step": max(syncs for _, syncs in within),
        "kernels_outside_window": outside,
        "rows_after_the_run": _rows(setup),
    }


def measure() -> dict[str, float]:
    """Count for both formats, and what of the adapter stays in reach of the sampled model."""
    found: dict[str, float] = {}
    for kind in KINDS:
        setup = build(kind)
        resident = {"resident_adapter_parameters": budget.resident_parameters(setup)}
        found |= {f"flux_{kind}_{name}": x for name, x in {**counts(setup), **resident}.items()}
    return found


def _rows(setup: Setup) -> int:
    """Count the K' and V' that a finished run leaves on the device."""
    rows = importlib.import_module(f"{host.PACK}.ip_adapter_core.comfyui.prompt_rows")
    setup.sample(setup.apply(setup.model))
    gc.collect()
    return sum(isinstance(thing, rows.PreparedPrompt) for thing in gc.get_objects())
