"""ComfyUI_IPAdapter_plus, from a folder that the caller names, in place of this pack."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.support.random_models import sections
from tools.comfyui import install as host

from . import budget
from .full_size import Setup


def counts(setup: Setup, models: dict[str, Any]) -> dict[str, float]:
    """Count what the peer adds to a step: kernels a layer, those with a mask, synchronisations."""
    (kernels, syncs), (masked, _) = budget.added(setup, models["one"], models["mask"])
    layers = len(setup.size.widths)
    return {
        "peer_kernels_per_layer": kernels / layers,
        "peer_kernels_per_layer_mask": masked / layers,
        "peer_syncs_per_step": syncs,
    }


def variants(setup: Setup, folder: Path) -> dict[str, Any]:
    """Return the models of `Setup.variants`, the peer's nodes in place of ours."""
    name = host.load_package("benchmark_peer", folder).__name__
    node = importlib.import_module(f"{name}.IPAdapterPlus").IPAdapterEmbeds()
    return setup.variants(partial(_apply, setup, node))


def _apply(setup: Setup, node: Any, model: Any, mask: torch.Tensor | None = None) -> Any:
    patched, *_ = node.apply_ipadapter(
        model,
        sections(setup.adapter.module.state_dict()),
        setup.prompt.positive.image_embeds,
        1.0,
        "linear",
        0.0,
        1.0,
        neg_embed=setup.prompt.negative.image_embeds,
        attn_mask=mask,
    )
    return patched
