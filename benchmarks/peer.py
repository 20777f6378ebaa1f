"""The same measurements of ComfyUI_IPAdapter_plus, from a folder that the caller names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import overhead
from .budget import LAYERS, added, per_step
from .world import World, thirds


def counts(world: World, folder: Path) -> dict[str, float]:
    """What the peer adds to a step: kernels a layer, those with a mask, synchronisations."""
    base = per_step(world.model)
    kernels, syncs = added(per_step(_apply(world, folder, world.model)), base)
    masked, _ = added(per_step(_apply(world, folder, world.model, thirds()[0])), base)
    return {
        "peer_kernels_per_layer": kernels / LAYERS,
        "peer_kernels_per_layer_mask": masked / LAYERS,
        "peer_syncs_per_step": syncs,
    }


def variants(world: World, folder: Path) -> dict[str, Any]:
    """The same models to time, the peer's nodes in place of ours."""
    return overhead.variants(world.model, partial(_apply, world, folder), "peer_")


def _apply(world: World, folder: Path, model: Any, mask: torch.Tensor | None = None) -> Any:
    weights: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in world.adapter.module.state_dict().items():
        part, name = key.split(".", 1)
        weights[part][name] = value
    node = _load(folder).IPAdapterEmbeds()
    patched, *_ = node.apply_ipadapter(
        model,
        weights,
        world.prompt.positive.image_embeds,
        1.0,
        "linear",
        0.0,
        1.0,
        neg_embed=world.prompt.negative.image_embeds,
        attn_mask=mask,
    )
    return patched


def _load(folder: Path) -> Any:
    name = "benchmark_peer"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{name}.IPAdapterPlus")
