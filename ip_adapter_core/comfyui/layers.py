"""The cross-attention layers of a UNet as ComfyUI builds it, and whether an adapter fits them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..adapter import AdapterSpec
from ..variants import describe_model


@dataclass(frozen=True)
class Layer:
    """One cross-attention layer: its place in the host's attention patches, and its widths.

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


def fits(spec: AdapterSpec, layers: Sequence[Layer]) -> bool:
    """Whether the adapter has W'k, W'v for exactly these layers."""
    return bool(layers) and (layers[0].context_dim, tuple(layer.dim for layer in layers)) == (
        spec.cross_attention_dim,
        spec.layer_dims,
    )


def check_fits(spec: AdapterSpec, adapter_name: str, model: ModelPatcher) -> None:
    """Raise ValueError unless the adapter has W'k, W'v for exactly this model's layers."""
    layers = cross_attention_layers(model.get_model_object("diffusion_model"))
    made_for = describe_model(spec.cross_attention_dim, len(spec.layer_dims))
    model_name = type(model.model).__name__
    if not layers:
        raise ValueError(
            f"'{adapter_name}' was made for {made_for}, but the connected model ({model_name}) "
            "has no UNet cross-attention layers. IP-Adapters work with models of the SD1.5 and "
            "SDXL families."
        )
    context_dim = layers[0].context_dim
    found = describe_model(context_dim, len(layers))
    if (context_dim, len(layers)) != (spec.cross_attention_dim, len(spec.layer_dims)):
        raise ValueError(
            f"'{adapter_name}' was made for {made_for}, but the connected model ({model_name}) "
            f"is {found}. Connect a model of the adapter's family, or load an adapter made for "
            "this one."
        )
    for number, (layer, width) in enumerate(zip(layers, spec.layer_dims, strict=True)):
        if layer.dim != width:
            raise ValueError(
                f"'{adapter_name}' does not fit the connected model ({model_name}): its layer "
                f"{number} (tensor ip_adapter.{2 * number + 1}) is {width} wide, but the model's "
                f"{layer.key} is {layer.dim} wide. Load an adapter made for this model."
            )
