"""The cross-attention layers of a UNet as ComfyUI builds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.model_patcher import ModelPatcher
from torch import nn

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

    key: tuple[str, int, int]
    dim: int
    context_dim: int


def cross_attention_layers(unet: nn.Module) -> tuple[Layer, ...]:
    """All layers in checkpoint order: down, up, middle. Empty for what is no such UNet."""
    return tuple(_walk(unet))


def layers_of(model: ModelPatcher) -> tuple[Layer, ...]:
    """All layers of a model in checkpoint order. Raises ValueError where there are none."""
    found = cross_attention_layers(model.get_model_object("diffusion_model"))
    if not found:
        raise ValueError(
            f"The connected model ({type(model.model).__name__}) has no UNet cross-attention "
            "layers. IP-Adapters work with models of the SD1.5 and SDXL families."
        )
    return found


def _walk(unet: nn.Module) -> Iterator[Layer]:
    middle = getattr(unet, "middle_block", None)
    sides = (
        ("input", getattr(unet, "input_blocks", ())),
        ("output", getattr(unet, "output_blocks", ())),
        ("middle", () if middle is None else (middle,)),
    )
    for side, blocks in sides:
        for number, block in enumerate(blocks):
            for module in block if isinstance(block, nn.Sequential) else ():
                if isinstance(module, SpatialTransformer):
                    for index, transformer in enumerate(module.transformer_blocks):
                        attention = transformer.attn2
                        if attention is not None:
                            yield Layer(
                                (side, number, index),
                                attention.heads * attention.dim_head,
                                attention.to_k.in_features,
                            )
