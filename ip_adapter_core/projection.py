"""Projections of a pooled or per-patch image feature into image-prompt tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from .files.header import Shaped
from .variants import FeatureKind


class Projection(nn.Module):
    """What all projections have: `(N, …, feature_dim) -> (N, tokens, cross_attention_dim)`.

    `features` is what they read of the image encoder; `reads` all of it, where that is more.
    """

    features: ClassVar[FeatureKind]
    reads: ClassVar[tuple[FeatureKind, ...]] = ()

    @staticmethod
    def sizes(weights: Mapping[str, Shaped]) -> dict[str, int]:
        """Return the constructor's arguments that these weights were made with."""
        raise NotImplementedError


class ImageProjection(Projection):
    """One linear layer and a LayerNorm: the paper's projection of the CLIP embedding.

    `(N, feature_dim) -> (N, tokens, cross_attention_dim)`. Paper section 3.2.1;
    `ip_adapter/ip_adapter.py:ImageProjModel` in the reference.
    """

    features = "image_embeds"

    def __init__(
        self,
        feature_dim: int,
        cross_attention_dim: int,
        tokens: int,
        *,
        operations: Any = nn,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = operations.Linear(feature_dim, tokens * cross_attention_dim, **factory)
        self.norm = operations.LayerNorm(cross_attention_dim, **factory)

    @staticmethod
    def sizes(weights: Mapping[str, Shaped]) -> dict[str, int]:
        width = weights["norm.weight"].shape[0]
        out, feature_dim = weights["proj.weight"].shape
        return {
            "feature_dim": feature_dim,
            "cross_attention_dim": width,
            "tokens": out // width,
        }

    def forward(self, image_embeds: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(image_embeds), "n (t d) -> n t d", t=self.tokens))


class TokensMLP(Projection):
    """Two linear layers and a LayerNorm over one vector of features: InstantX's for Flux.

    `(N, feature_dim) -> (N, tokens, cross_attention_dim)`; `ip_adapter/ip_adapter_faceid.py:
    MLPProjModel` in the reference, which InstantX took over.
    """

    features: ClassVar[FeatureKind] = "image_embeds"

    def __init__(
        self,
        feature_dim: int,
        cross_attention_dim: int,
        tokens: int,
        hidden: int,
        *,
        operations: Any = nn,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Sequential(
            operations.Linear(feature_dim, hidden, **factory),
            nn.GELU(),
            operations.Linear(hidden, tokens * cross_attention_dim, **factory),
        )
        self.norm = operations.LayerNorm(cross_attention_dim, **factory)

    @staticmethod
    def sizes(weights: Mapping[str, Shaped]) -> dict[str, int]:
        width = weights["norm.weight"].shape[0]
        hidden, feature_dim = weights["proj.0.weight"].shape
        return {
            "feature_dim": feature_dim,
            "cross_attention_dim": width,
            "tokens": weights["proj.2.weight"].shape[0] // width,
            "hidden": hidden,
        }

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(features), "n (t d) -> n t d", t=self.tokens))


class MLPProjection(Projection):
    """Every hidden state of the encoder becomes a token: the "full" adapters.

    `(N, patches, feature_dim) -> (N, patches, cross_attention_dim)`;
    `ip_adapter/ip_adapter.py:MLPProjModel` in the reference.
    """

    features = "penultimate_hidden_states"

    def __init__(
        self, feature_dim: int, cross_attention_dim: int, *, operations: Any = nn, **factory: Any
    ) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(feature_dim, feature_dim, **factory),
            nn.GELU(),
            operations.Linear(feature_dim, cross_attention_dim, **factory),
            operations.LayerNorm(cross_attention_dim, **factory),
        )

    @staticmethod
    def sizes(weights: Mapping[str, Shaped]) -> dict[str, int]:
        cross_attention_dim, feature_dim = weights["proj.2.weight"].shape
        return {"feature_dim": feature_dim, "cross_attention_dim": cross_attention_dim}

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(hidden_states)
