"""Where image prompts act in a model as ComfyUI builds it: a UNet's layers, a transformer's blocks.

They are known by what they have and not by class: packs put classes of their own in the place of
ComfyUI's, some while a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from comfy.model_patcher import ModelPatcher
from torch import nn

from ..layer_weights import Block, LayerKey
from ..variants import CROSS_ATTENTION, Place

KEY = "ip_adapter"
"""Of the pack's wrappers, attachments and conditionings."""
Conds: TypeAlias = dict[str, list[dict[str, Any]]]
LAYERS = f"{KEY}.layers"  # in the run's transformer_options
BLOCKS = f"{KEY}.blocks"  # the same: `Blocks`, for other packs replace a Flux's during a call
RECORD = f"{KEY}.record"  # the same, and an attachment of the model


@dataclass(frozen=True)
class Layer:
    """One layer with decoupled attention: its place in ComfyUI's patches, and its widths.

    `key` is ("input" | "output" | "middle", number of the block, index of the transformer), or
    ("double" | "single", number of the block, 0). `context_dim`: of the text states.
    """

    key: LayerKey
    dim: int
    context_dim: int
    dim_head: int


def layers_at(model: nn.Module, place: Place) -> tuple[Layer, ...]:
    """All layers at a place, in checkpoint order. Empty for what has none there."""
    return _WALKS[place](model)


def cross_attention_layers(unet: nn.Module) -> tuple[Layer, ...]:
    """All layers in checkpoint order: down, up, middle. Empty for what is no such UNet."""
    return tuple(
        Layer(
            key,
            attention.heads * attention.dim_head,
            attention.to_k.in_features,
            attention.dim_head,
        )
        for key, attention in cross_attentions(unet)
    )


def blocks_of(transformer: nn.Module) -> dict[Block, Any]:
    """Return the blocks of a Flux.1: those of two streams, then those of a single one."""
    text = getattr(getattr(transformer, "txt_in", None), "in_features", None)
    flux2 = getattr(getattr(transformer, "params", None), "global_modulation", False)
    if text is None or flux2:  # some of its relatives refine the text first
        return {}
    return {
        (kind, number): block
        for kind in ("double", "single")
        for number, block in enumerate(getattr(transformer, f"{kind}_blocks", ()))
    }


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one Flux. Who copies options deeply, as packs do, gets this one again."""

    transformer: nn.Module
    modules: Mapping[Block, Any]

    @classmethod
    def of(cls, transformer: nn.Module) -> Blocks:
        return cls(transformer, blocks_of(transformer))

    def __deepcopy__(self, memo: Any) -> Blocks:
        return self


def _blocks(transformer: Any, *kinds: str) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            (*key, 0),
            block.hidden_size,
            transformer.txt_in.in_features,
            block.hidden_size // block.num_heads,
        )
        for key, block in blocks_of(transformer).items()
        if key[0] in kinds
    )


_WALKS: dict[Place, Callable[[nn.Module], tuple[Layer, ...]]] = {
    CROSS_ATTENTION: cross_attention_layers,
    "attention output": lambda model: _blocks(model, "double", "single"),
    "block output": lambda model: _blocks(model, "double"),
}


def layers_by_place(model: nn.Module) -> dict[Place, tuple[Layer, ...]]:
    """Return the layers at every place, none for most."""
    return {place: walk(model) for place, walk in _WALKS.items()}


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
    inner = model.get_model_object("diffusion_model")
    found = cross_attention_layers(inner) or layers_at(inner, "attention output")
    if not found:
        raise ValueError(
            f"The connected model ({name_of(model)}) has no UNet cross-attention layers, nor the "
            "blocks of Flux.1, which IP-Adapters act on. They work with models of the SD1.5, SDXL "
            "and Flux.1 families."
        )
    return found


def name_of(model: ModelPatcher) -> str:
    """Return what ComfyUI calls a model, for messages."""
    names = type(model.model).__name__, type(getattr(model.model, "model_config", None)).__name__
    return names[0] if names[1] in (names[0], "NoneType") else f"{names[0]}, {names[1]}"


def cross_attentions(unet: nn.Module) -> Iterator[tuple[LayerKey, Any]]:
    """Yield each layer's key and module, in checkpoint order."""
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
