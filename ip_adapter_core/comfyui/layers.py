"""The cross-attention layers of a UNet as ComfyUI builds it, and who may watch them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

if TYPE_CHECKING:
    from .decoupled_attention import DecoupledAttention
    from .masks import Size
    from .prompt_rows import SamplingRun

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


class AttentionRecord(Protocol):
    """Who wants to see what the image prompts do at every layer (see record.py)."""

    def watching(
        self, sample: Callable[..., Any], run: SamplingRun, conds: Conds
    ) -> Callable[..., Any]:
        """Return the same sampling run, watched."""

    def evaluates(self, conds: list[Any], latent: Size) -> None:
        """Note that these conditionings are about to be evaluated on latents of this size.

        Their prompts are those in force.
        """

    def look(
        self, options: dict[str, Any], latent: tuple[int, int]
    ) -> Callable[[DecoupledAttention, Layer], Callable[..., Tensor]] | None:
        """Return what watches the layers of one UNet call on latents of this size, if any."""


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
