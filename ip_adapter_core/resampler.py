"""The query network of the fine-grained adapters: Flamingo's perceiver resampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from .files.header import Shaped
from .projection import Projection
from .variants import FeatureKind

DIM_HEAD = 64  # not visible in any weight's shape; every published adapter uses it


class PerceiverAttention(nn.Module):
    """Learned latents attend to the image features and to themselves.

    `(N, patches, dim), (N, tokens, dim) -> (N, tokens, dim)`.
    Flamingo (arXiv 2204.14198) section 3.1; `ip_adapter/resampler.py` in the reference.
    """

    def __init__(self, dim: int, heads: int, *, operations: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * DIM_HEAD
        self.norm1 = operations.LayerNorm(dim, **factory)
        self.norm2 = operations.LayerNorm(dim, **factory)
        self.to_q = operations.Linear(dim, inner, bias=False, **factory)
        self.to_kv = operations.Linear(dim, 2 * inner, bias=False, **factory)
        self.to_out = operations.Linear(inner, dim, bias=False, **factory)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        features, latents = self.norm1(features), self.norm2(latents)
        query = rearrange(self.to_q(latents), "b l (h d) -> b h l d", h=self.heads)
        both = self.to_kv(torch.cat([features, latents], dim=1))
        key, value = rearrange(both, "b l (two h d) -> two b h l d", two=2, h=self.heads)
        # Half of the scale on each side: in half precision q·k would overflow otherwise.
        scale = DIM_HEAD**-0.25
        scores = (query * scale) @ (key * scale).transpose(-1, -2)
        weights = scores.float().softmax(dim=-1).to(scores.dtype)
        return self.to_out(rearrange(weights @ value, "b h l d -> b l (h d)"))


class ResamplerLayer(nn.ModuleList):
    """Attention and a feed-forward network, each with a residual."""

    def __init__(self, dim: int, heads: int, expansion: int, *, operations: Any, **factory: Any):
        super().__init__(
            [
                PerceiverAttention(dim, heads, operations=operations, **factory),
                nn.Sequential(
                    operations.LayerNorm(dim, **factory),
                    operations.Linear(dim, expansion * dim, bias=False, **factory),
                    nn.GELU(),
                    operations.Linear(expansion * dim, dim, bias=False, **factory),
                ),
            ]
        )

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        attention, feedforward = self
        latents = attention(features, latents) + latents
        return feedforward(latents) + latents


class Resampler(Projection):
    """Learned queries read the encoder's penultimate hidden states.

    `(N, patches, feature_dim) -> (N, tokens, cross_attention_dim)`. Paper section 4.4.2
    ("fine-grained features"); `ip_adapter/resampler.py:Resampler` in the reference.
    """

    features: ClassVar[FeatureKind] = "penultimate_hidden_states"

    def __init__(
        self,
        feature_dim: int,
        cross_attention_dim: int,
        tokens: int = 16,
        dim: int = 768,
        depth: int = 4,
        heads: int = 12,
        expansion: int = 4,
        *,
        operations: Any = nn,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, dim, **factory) / dim**0.5)
        self.proj_in = operations.Linear(feature_dim, dim, **factory)
        self.proj_out = operations.Linear(dim, cross_attention_dim, **factory)
        self.norm_out = operations.LayerNorm(cross_attention_dim, **factory)
        self.layers = nn.ModuleList(
            ResamplerLayer(dim, heads, expansion, operations=operations, **factory)
            for _ in range(depth)
        )

    @staticmethod
    def sizes(weights: Mapping[str, Shaped]) -> dict[str, int]:
        dim, feature_dim = weights["proj_in.weight"].shape
        return {
            "feature_dim": feature_dim,
            "cross_attention_dim": weights["proj_out.weight"].shape[0],
            "tokens": weights["latents"].shape[1],
            "dim": dim,
            "depth": len({key.split(".")[1] for key in weights if key.startswith("layers.")}),
            "heads": weights["layers.0.0.to_q.weight"].shape[0] // DIM_HEAD,
            "expansion": weights["layers.0.1.1.weight"].shape[0] // dim,
        }

    def forward(self, hidden_states: Tensor) -> Tensor:
        features = self.proj_in(hidden_states)
        latents = self.latents.to(features).expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        return self.norm_out(self.proj_out(latents))
