"""Decoupled cross-attention in a diffusers UNet, and the adapter that training starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ip_adapter_core.adapter import AdapterSpec, IPAdapter
from ip_adapter_core.attention import add, image_attention
from ip_adapter_core.variants import Variant

from .errors import TrainingError

KeysValues: TypeAlias = Sequence[tuple[Tensor, Tensor]]
# The published adapters' (paper, section 4.1.2).
TOKENS: dict[Variant, int] = {"base": 4, "plus": 16}


class DecoupledAttnProcessor:
    """Cross-attention over the text plus cross-attention over layer `index`'s K', V'.

    They come with the call, `unet(..., cross_attention_kwargs={"ip_hidden_states": keys_values})`
    (keys and values, not tokens: that is the name which diffusers' own processors let pass),
    as tensors that gradients flow through: this object holds nothing that trains. Without them it
    is diffusers' own attention.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        ip_hidden_states: KeysValues | None = None,
    ) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        if attention_mask is not None:
            tokens = encoder_hidden_states.shape[1]
            mask = attn.prepare_attention_mask(attention_mask, tokens, len(hidden_states))
            attention_mask = mask.unflatten(0, (-1, attn.heads))
        query = attn.to_q(hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out = scaled_dot_product_attention(split(query), split(key), split(value), attention_mask)
        out = out.transpose(1, 2).flatten(2)
        if ip_hidden_states is not None:
            image_key, image_value = (x.to(query.dtype) for x in ip_hidden_states[self.index])
            out = add(out, image_attention(query, image_key, image_value, attn.heads), None)
        to_out, dropout = attn.to_out
        return dropout(to_out(out))


def cross_attention_layers(unet: Any) -> dict[str, Any]:
    """Return a UNet2DConditionModel's cross-attention modules by name: down, up, middle.

    Raises TrainingError if they are not where N = 1, 3, 5 … of the official keys says.
    """
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    layers = {name: unet.get_submodule(name) for name in names if name.endswith("attn2")}
    if not layers or [*layers] != names[1::2]:
        raise TrainingError(
            f"This UNet has {len(layers) or 'no'} cross-attention layers among {len(names)} "
            "attention layers; expected every second one, as in SD1.5 and SDXL. An IP-Adapter "
            "of the official layout cannot be trained on it."
        )
    return layers


def attach(unet: Any) -> None:
    """Let every cross-attention layer of `unet` take part in decoupled cross-attention."""
    for index, layer in enumerate(cross_attention_layers(unet).values()):
        layer.set_processor(DecoupledAttnProcessor(index))


def new_adapter(
    unet: Any,
    variant: Variant,
    feature_dim: int,
    resampler_dim: int | None = None,
    resampler_depth: int = 4,
) -> IPAdapter:
    """Build an adapter in float32 whose W'k, W'v are the UNet's W_k, W_v (paper, section 3.2.2).

    `feature_dim`: width of what the variant reads of the image encoder. `resampler_dim`,
    `resampler_depth`: of the plus variant's resampler, in heads of 64 each; by default
    the published ones' 768 (SD1.5) or 1280 (SDXL), and 4. The projection starts from torch's
    own initial values; seed them with `torch.manual_seed`.
    """
    layers = cross_attention_layers(unet)
    width = unet.config.cross_attention_dim
    sizes = {"feature_dim": feature_dim, "cross_attention_dim": width}
    if variant in TOKENS:
        sizes["tokens"] = TOKENS[variant]
    if variant == "plus":  # the published SDXL adapters keep to 20 heads
        dim = resampler_dim or min(width, 1280)
        sizes |= {"dim": dim, "depth": resampler_depth, "heads": max(1, dim // 64), "expansion": 4}
    dims = tuple(layer.to_k.out_features for layer in layers.values())
    adapter = IPAdapter(AdapterSpec(variant, tuple(sizes.items()), dims))
    with torch.no_grad():
        mine: Any
        for mine, text in zip(adapter.ip_adapter.values(), layers.values(), strict=True):
            mine.to_k_ip.weight.copy_(text.to_k.weight)
            mine.to_v_ip.weight.copy_(text.to_v.weight)
    return adapter.float()
