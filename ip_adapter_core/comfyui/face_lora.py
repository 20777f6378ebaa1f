"""The LoRA that a FaceID adapter carries, on the model that it is applied to."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..files.adapter_file import LORA
from .layers import KEY, attention_names
from .loaders import ManagedAdapter

logger = logging.getLogger("comfyui_ip_adapter")
_APPLIED = f"{KEY}.lora"  # an attachment: the LoRA that a model has, each with its weight


def with_lora(model: ModelPatcher, adapter: ManagedAdapter, weight: float) -> ModelPatcher:
    """Return a clone with the adapter's LoRA times `weight`, by ComfyUI's own loader.

    The model itself where there is none, the weight is 0, or it has it already: from another Apply
    node, or from a separate file.
    """
    lora = adapter.module.lora
    if not lora or not weight:
        return model
    applied: tuple[Any, ...] = model.get_attachment(_APPLIED) or ()
    for other, acting in applied:
        if _equal(other, lora):
            if acting != weight:
                logger.warning(
                    "The LoRA of '%s' acts on this model already, at %g; the lora_weight %g of a "
                    "further node does not change it.",
                    adapter.name,
                    acting,
                    weight,
                )
            return model
    named = _named(model, lora)
    if _has(model, named):
        logger.warning(
            "The model has the LoRA of '%s' already, from a LoRA loader; it is not applied again. "
            "The adapter brings it: take that loader out.",
            adapter.name,
        )
        return model
    made, _ = comfy.sd.load_lora_for_models(model, None, named, weight, 0)
    made.set_attachments(_APPLIED, (*applied, (lora, weight)))
    return made


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two loaders read the same LoRA: by its first layer, as `_has` does."""
    key = next(iter(other))
    found = one.get(key)
    return one is other or (
        found is not None
        and found.shape == other[key].shape
        and torch.equal(found.float().cpu(), other[key].float().cpu())
    )


def _named(model: ModelPatcher, lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return it under the names that ComfyUI's loader knows."""
    names = [*attention_names(model.get_model_object("diffusion_model"))]
    made = {}
    for key, tensor in lora.items():
        match = LORA.fullmatch(key)
        assert match is not None
        number, part, side = int(match[1]), match[2], match[3]
        layer = f"{names[number]}.to_{part}" + (".0" if part == "out" else "")
        made[f"diffusion_model.{layer}_lora.{side}.weight"] = tensor
    return made


def _has(model: ModelPatcher, named: dict[str, Tensor]) -> bool:
    """Return whether a patch of the model's first layer is this LoRA."""
    up = next(key for key in named if key.endswith("_lora.up.weight"))
    key = f"{up.removesuffix('_lora.up.weight')}.weight"
    for patch in model.patches.get(key, ()):
        weights = getattr(patch[1], "weights", ())
        theirs = weights[0] if weights and isinstance(weights[0], Tensor) else None
        if theirs is None or theirs.shape != named[up].shape:
            continue
        if torch.equal(theirs.float().cpu(), named[up].float().cpu()):
            return True
    return False
