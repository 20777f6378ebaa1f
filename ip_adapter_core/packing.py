"""From image features to one tensor: the K'/V' of all layers with λ folded in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from .adapter import AdapterSpec, IPAdapter
from .image_prompt import ImagePrompt

COMBINE = ("concat", "average", "per_latent")


def tokens(adapter: IPAdapter, prompt: ImagePrompt, combine: str) -> tuple[Tensor, Tensor]:
    """Return the tokens of both sides, `(R, T, cross_attention_dim)`.

    `concat`: all images' tokens side by side, R = 1; where one side's T divides the other's, both
    get the same, and share a slot in the UNet call. `average`: the mean of the encoder's
    features, R = 1. `per_latent`: one row an image, R = N for the positive side.
    Raises ValueError for another `combine`, or per-latent sides of different numbers.
    """
    if combine not in COMBINE:
        raise ValueError(f"combine is {combine!r}; expected one of {', '.join(COMBINE)}.")
    sides = prompt.positive, prompt.negative
    if combine == "average":
        sides = sides[0].mean(), sides[1].mean()
    positive, negative = (adapter.tokens(getattr(s, adapter.spec.features)) for s in sides)
    if combine == "concat":
        positive, negative = (rearrange(x, "n t d -> 1 (n t) d") for x in (positive, negative))
        # Repeating every token equally often leaves the softmax's result as it is.
        length = max(positive.shape[1], negative.shape[1])
        positive, negative = (
            x if length % x.shape[1] else repeat(x, "r t d -> r (n t) d", n=length // x.shape[1])
            for x in (positive, negative)
        )
    elif negative.shape[0] not in (1, positive.shape[0]):
        raise ValueError(
            f"per_latent takes one negative image, or one for each image; found "
            f"{positive.shape[0]} images and {negative.shape[0]} negative images."
        )
    return positive, negative


def layer_weights(spec: AdapterSpec, weight: float, layers: Sequence[float] | None) -> list[float]:
    """Return λ of every layer, in checkpoint order.

    Raises:
        ValueError: A weight is not finite, or the list has another length than the adapter has
            layers.
    """
    if layers is None:
        layers = [1.0] * len(spec.layer_dims)
    if len(layers) != len(spec.layer_dims):
        raise ValueError(
            f"layer_weights holds {len(layers)} values, but the adapter has "
            f"{len(spec.layer_dims)} cross-attention layers: give one value a layer, in "
            "checkpoint order (down, up, middle)."
        )
    folded = [weight * x for x in layers]
    if not all(map(math.isfinite, folded)):
        raise ValueError(
            f"weight (λ) must be a finite number on every layer; found weight {weight} "
            f"times layer_weights {list(layers)}."
        )
    return folded


def fold(keys_values: Iterable[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Tensor:
    """Fold λ into V', and all layers into one tensor `(R, T, 2·Σ widths)`: K'₀ V'₀ K'₁ V'₁."""
    parts: list[Tensor] = []
    for (key, value), weight in zip(keys_values, weights, strict=True):
        parts += key, value * weight
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, layer_dims: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Undo `fold`: return views of K' and V' of each layer."""
    parts = packed.split([dim for dim in layer_dims for _ in "kv"], dim=-1)
    return list(zip(parts[::2], parts[1::2], strict=True))


def split_values(packed: Tensor, layer_dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return `packed` with zeros for V', and with zeros for K'.

    The one plus any multiple of the other is the same prompt with another λ.
    """
    widths = torch.tensor([dim for dim in layer_dims for _ in "kv"])
    columns = torch.tensor([False, True] * len(layer_dims)).repeat_interleave(widths)
    values = packed * columns.to(packed)
    return packed - values, values
