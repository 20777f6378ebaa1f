"""Decoupled cross-attention in a diffusers UNet, and the adapter that training starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ip_adapter_core.adapter import AdapterSpec, IPAdapter
from ip_adapter_core.attention import add, image_attention
from ip_adapter_core.variants import Variant

from .errors import TrainingError

KeysValues: TypeAlias = Sequence[tuple[Tensor, Tensor]]
Lora: TypeAlias = Sequence[dict[str, tuple[Tensor, Tensor]]]
"""For each attention layer and part of it (q, k, v, out), `down` and `up`."""
# The published adapters' (paper, section 4.1.2).
TOKENS: dict[Variant, int] = {"base": 4, "plus": 16, "faceid": 4}
LORA_RANK = 128  # the published FaceID adapters'
PARTS = ("q", "k", "v", "out")  # of an attention layer, which it changes


class DecoupledAttnProcessor:
    """Attention layer `number`: where that is odd, over the text plus over its K', V'.

    They come with the call, `unet(..., cross_attention_kwargs=attention_inputs(…))`, as tensors
    that gradients flow through: this object holds nothing that trains. Without them it is
    diffusers' own attention.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: KeysValues | None = None,
        lora: Lora | None = None,
    ) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def project(part: str, layer: Any, x: Tensor) -> Tensor:
            if lora is None:
                return layer(x)
            down, up = (weight.to(x) for weight in lora[self.number][part])
            return layer(x) + linear(linear(x, down), up)

        if encoder_hidden_states is None:  # self-attention
            encoder_hidden_states = hidden_states
        if attention_mask is not None:
            tokens = encoder_hidden_states.shape[1]
            mask = attn.prepare_attention_mask(attention_mask, tokens, len(hidden_states))
            attention_mask = mask.unflatten(0, (-1, attn.heads))
        query = project("q", attn.to_q, hidden_states)
        key = project("k", attn.to_k, encoder_hidden_states)
        value = project("v", attn.to_v, encoder_hidden_states)
        out = scaled_dot_product_attention(split(query), split(key), split(value), attention_mask)
        out = out.transpose(1, 2).flatten(2)
        if ip_hidden_states is not None and self.number % 2:
            image_key, image_value = (x.to(query.dtype) for x in ip_hidden_states[self.number // 2])
            out = add(out, image_attention(query, image_key, image_value, attn.heads), None)
        to_out, dropout = attn.to_out
        return dropout(project("out", to_out, out))


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
    """Let every attention layer of `unet` take what `attention_inputs` gives."""
    cross_attention_layers(unet)  # checks
    for number, layer in enumerate(_attention_layers(unet)):
        layer.set_processor(DecoupledAttnProcessor(number))


def _attention_layers(unet: Any) -> list[Any]:
    """Return all attention modules in the order of the official keys."""
    return [unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors]


def attention_inputs(keys_values: KeysValues, adapter: nn.Module) -> dict[str, Any]:
    """Return an attached UNet's `cross_attention_kwargs`: K' and V', and the adapter's LoRA."""
    layers: Any = extract_model_from_parallel(adapter).ip_adapter
    if "0" not in layers:
        return {"ip_hidden_states": keys_values}
    numbered = [layers[str(number)] for number in range(len(layers))]
    lora = [{part: getattr(x, f"to_{part}_lora").weights for part in PARTS} for x in numbered]
    return {"ip_hidden_states": keys_values, "lora": lora}


class LoraPart(nn.Module):
    """A change of rank `LORA_RANK` to a linear layer; none as training begins."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, LORA_RANK, bias=False)
        self.up = nn.Linear(LORA_RANK, layer.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / LORA_RANK)
        nn.init.zeros_(self.up.weight)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.down.weight, self.up.weight


def _add_lora(adapter: IPAdapter, unet: Any) -> None:
    """Make a LoRA on every attention layer part of an adapter, under the keys of FaceID files."""
    for number, layer in enumerate(_attention_layers(unet)):
        place: nn.Module = adapter.ip_adapter[str(number)] if number % 2 else nn.Module()
        for part in PARTS:
            changed = layer.to_out[0] if part == "out" else layer.get_submodule(f"to_{part}")
            place.add_module(f"to_{part}_lora", LoraPart(changed))
        adapter.ip_adapter[str(number)] = place


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
    own initial values; seed them with `torch.manual_seed`. That of faceid has a LoRA in its state.
    """
    layers = cross_attention_layers(unet)
    width = unet.config.cross_attention_dim
    sizes = {"feature_dim": feature_dim, "cross_attention_dim": width}
    if variant in TOKENS:
        sizes["tokens"] = TOKENS[variant]
    if variant == "plus":  # the published SDXL adapters keep to 20 heads
        dim = resampler_dim or min(width, 1280)
        sizes |= {"dim": dim, "depth": resampler_depth, "heads": max(1, dim // 64), "expansion": 4}
    if variant == "faceid":
        sizes["hidden"] = 2 * feature_dim
    dims = tuple(layer.to_k.out_features for layer in layers.values())
    adapter = IPAdapter(AdapterSpec(variant, tuple(sizes.items()), dims))
    with torch.no_grad():
        mine: Any
        for mine, text in zip(adapter.ip_adapter.values(), layers.values(), strict=True):
            mine.to_k_ip.weight.copy_(text.to_k.weight)
            mine.to_v_ip.weight.copy_(text.to_v.weight)
    if variant == "faceid":
        _add_lora(adapter, unet)
    return adapter.float()
