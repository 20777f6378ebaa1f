"""The cross-attention layers of a UNet as ComfyUI builds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from comfy.model_patcher import ModelPatcher
from torch import nn

from ..layer_weights import LayerKey

KEY = "ip_adapter"
"""Of the pack's wrappers, attachments and conditionings."""
LAYERS = f"{KEY}.layers"  # in the run's transformer_options
Conds: TypeAlias = dict[str, list[dict[str, Any]]]
RECORD = f"{KEY}.record"  # the same, and an attachment of the model


@dataclass(frozen=True)
class Layer:
    """One cross-attention layer: its place in ComfyUI's attention patches, and its widths.

    `key` is ("input" | "output" | "middle", number of the block, index of the transformer).
    """

    key: LayerKey
    dim: int
    context_dim: int


def cross_attention_layers(unet: nn.Module) -> tuple[Layer, ...]:
    """All layers in checkpoint order: down, up, middle. Empty for what is no such UNet."""
    return tuple(
        Layer(key, attention.heads * attention.dim_head, attention.to_k.in_features)
        for key, attention in cross_attentions(unet)
    )


def attention_names(unet: nn.Module) -> Iterator[str]:
    """Yield the names of all attention modules, numbered as checkpoints of adapters do.

    Self-attention, then cross-attention, of each transformer block in checkpoint order.
    """
    modules = {id(module): name for name, module in unet.named_modules()}
    for _, attention in cross_attentions(unet):
        block = modules[id(attention)].rpartition(".")[0]
        yield from (f"{block}.attn1", f"{block}.attn2")


def is_kolors(unet: nn.Module) -> bool:
    """Return whether it is Kolors: SDXL's layers behind a layer of its own for the text."""
    return hasattr(unet, "encoder_hid_proj")


def frames_of(options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return which latents of the batch a call is about; None for all of them.

    As ComfyUI's context windows tell, or AnimateDiff-Evolved's.
    """
    window = options.get("context_window")
    if window is not None:
        return tuple(window.index_list)
    frames = (options.get("ad_params") or {}).get("sub_idxs")
    return None if frames is None else tuple(frames)


def layers_of(model: ModelPatcher) -> tuple[Layer, ...]:
    """All layers of a model in checkpoint order. Raises ValueError where there are none."""
    found = cross_attention_layers(model.get_model_object("diffusion_model"))
    if not found:
        raise ValueError(
            f"The connected model ({type(model.model).__name__}) has no UNet cross-attention "
            "layers. IP-Adapters work with models of the SD1.5 and SDXL families."
        )
    return found


def cross_attentions(unet: nn.Module) -> Iterator[tuple[LayerKey, Any]]:
    """Yield each layer's key and module, in checkpoint order.

    They are known by what they have and not by class: packs put classes of their own in the place
    of ComfyUI's, some while a model is loaded.
    """
    middle = getattr(unet, "middle_block", None)
    sides = (
        ("input", getattr(unet, "input_blocks", ())),
        ("output", getattr(unet, "output_blocks", ())),
        ("middle", () if middle is None else (middle,)),
    )
    for side, blocks in sides:
        for number, block in enumerate(blocks):
            for module in block if isinstance(block, nn.Sequential) else ():
                for index, transformer in enumerate(getattr(module, "transformer_blocks", ())):
                    attention = getattr(transformer, "attn2", None)
                    if hasattr(attention, "to_k") and hasattr(attention, "dim_head"):
                        yield (side, number, index), attention
