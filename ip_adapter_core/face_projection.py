"""Projections of face embeddings (ArcFace's 512 numbers) into image-prompt tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from .files.header import Shaped
from .projection import Projection, TokensMLP
from .resampler import DIM_HEAD, Resampler, ResamplerLayer
from .variants import FACE, FeatureKind

WIDTH = 512
"""Of a face embedding."""


def unit(face_embeds: Tensor) -> Tensor:
    """Return embeddings of length 1.

    What is no longer than that stays as it is: no face, which is zero, and an average of others of
    length 1, which the reference does not lengthen either.
    """
    return face_embeds / face_embeds.norm(dim=-1, keepdim=True).clamp(min=1.0)


class FaceProjection(TokensMLP):
    """The projection of FaceID and Portrait, over a face embedding of length 1.

    `(N, 512) -> (N, tokens, cross_attention_dim)`; 4 tokens, Portrait 16.
    """

    features = FACE

    def forward(self, face_embeds: Tensor, exact: bool = False) -> Tensor:
        return super().forward(face_embeds if exact else unit(face_embeds))


class _Perceiver(nn.Module):
    """Tokens read the crop's hidden states: a resampler whose latents are given."""

    def __init__(
        self,
        feature_dim: int,
        dim: int,
        depth: int,
        heads: int,
        expansion: int,
        *,
        operations: Any,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.proj_in = operations.Linear(feature_dim, dim, **factory)
        self.proj_out = operations.Linear(dim, dim, **factory)
        self.norm_out = operations.LayerNorm(dim, **factory)
        self.layers = nn.ModuleList(
            ResamplerLayer(dim, heads, expansion, operations=operations, **factory)
            for _ in range(depth)
        )

    def forward(self, latents: Tensor, hidden_states: Tensor) -> Tensor:
        features = self.proj_in(hidden_states)
        for layer in self.layers:
            latents = layer(features, latents)
        return self.norm_out(self.proj_out(latents))


class FacePerceiver(Projection):
    """FaceID Plus: a face's tokens read the penultimate hidden states of its crop.

    `(N, 512), (N, patches, feature_dim) -> (N, tokens, cross_attention_dim)`. With x the face's
    tokens and y what they read: v1 gives y, v2 (`shortcut`) x + `structure` · y.
    `ip_adapter/ip_adapter_faceid.py:ProjPlusModel` in the reference.
    """

    features = "penultimate_hidden_states"
    reads: ClassVar[tuple[FeatureKind, ...]] = (FACE, "penultimate_hidden_states")

    def __init__(
        self,
        feature_dim: int,
        cross_attention_dim: int,
        tokens: int,
        face_dim: int,
        hidden: int,
        depth: int,
        heads: int,
        expansion: int,
        shortcut: int = 1,
        *,
        operations: Any = nn,
        **factory: Any,
    ) -> None:
        super().__init__()
        build = {"operations": operations, **factory}
        face = FaceProjection(face_dim, cross_attention_dim, tokens, hidden, **build)
        self.tokens, self.shortcut = tokens, bool(shortcut)
        self.proj, self.norm = face.proj, face.norm
        self.perceiver_resampler = _Perceiver(
            feature_dim, cross_attention_dim, depth, heads, expansion, **build
        )

    @staticmethod
    def sizes(weights: Mapping[str, Shaped]) -> dict[str, int]:
        face = FaceProjection.sizes(weights)
        inner = "perceiver_resampler."
        own = {k.removeprefix(inner): x for k, x in weights.items() if k.startswith(inner)}
        dim, feature_dim = own["proj_in.weight"].shape
        return {
            **face,
            "feature_dim": feature_dim,
            "face_dim": face["feature_dim"],
            "depth": len({key.split(".")[1] for key in own if key.startswith("layers.")}),
            "heads": own["layers.0.0.to_q.weight"].shape[0] // DIM_HEAD,
            "expansion": own["layers.0.1.1.weight"].shape[0] // dim,
        }

    def forward(
        self,
        face_embeds: Tensor,
        hidden_states: Tensor,
        structure: float = 1.0,
        exact: bool = False,
    ) -> Tensor:
        made = self.proj(face_embeds if exact else unit(face_embeds))
        face = self.norm(rearrange(made, "n (t d) -> n t d", t=self.tokens))
        out = self.perceiver_resampler(face, hidden_states)
        return face + structure * out if self.shortcut else out


class FaceResampler(Resampler):
    """Portrait Unnorm: learned queries read the face embedding as the face encoder gives it.

    `(N, 512) -> (N, tokens, cross_attention_dim)`.
    """

    features = FACE

    def forward(self, face_embeds: Tensor) -> Tensor:
        return super().forward(face_embeds[:, None])
