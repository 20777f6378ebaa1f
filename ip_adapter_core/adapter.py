"""The adapter itself: a projection into tokens, and W'k, W'v for every cross-attention layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .face_projection import FacePerceiver, FaceProjection, FaceResampler
from .projection import ImageProjection, MLPProjection, Projection
from .resampler import Resampler
from .variants import FeatureKind, Variant

PROJECTIONS: dict[Variant, type[Projection]] = {
    "base": ImageProjection,
    "plus": Resampler,
    "full": MLPProjection,
    "faceid": FaceProjection,
    "faceid-plus": FacePerceiver,
    "faceid-unnorm": FaceResampler,
}
_KOLORS_DIM = 2048  # of its resampler; SDXL's has 1280


@dataclass(frozen=True)
class AdapterSpec:
    """What a checkpoint is, read off its tensors' shapes.

    `projection_sizes` are the arguments of the variant's class in `PROJECTIONS`.
    `layer_dims` holds the width of K' and V' of each cross-attention layer in checkpoint order
    (down, up, middle: the order of diffusers' `unet.attn_processors`).
    """

    variant: Variant
    projection_sizes: tuple[tuple[str, int], ...]
    layer_dims: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of the projection's class."""
        return dict(self.projection_sizes)

    @property
    def features(self) -> FeatureKind:
        """What the projection reads of the image encoder, or of a face alone."""
        return PROJECTIONS[self.variant].features

    @property
    def reads(self) -> tuple[FeatureKind, ...]:
        """All that the projection reads, in the order of its arguments."""
        return PROJECTIONS[self.variant].reads or (self.features,)

    def width(self, kind: FeatureKind) -> int:
        """Return the width of what it reads of that kind."""
        return self.feature_dim if kind == self.features else self.sizes["face_dim"]

    @property
    def kolors(self) -> bool:
        """Whether it was made for Kolors, whose layers are SDXL's."""
        return self.variant == "plus" and self.sizes["dim"] == _KOLORS_DIM

    @property
    def feature_dim(self) -> int:
        return self.sizes["feature_dim"]

    @property
    def cross_attention_dim(self) -> int:
        return self.sizes["cross_attention_dim"]

    @property
    def tokens(self) -> int | None:
        """Tokens an image becomes; None: one for each hidden state of the encoder."""
        return self.sizes.get("tokens")


class ImageKeysValues(nn.Module):
    """W'k and W'v of one layer: `(N, tokens, cross_attention_dim) -> 2 × (N, tokens, width)`."""

    def __init__(
        self, cross_attention_dim: int, width: int, *, operations: Any = nn, **factory: Any
    ) -> None:
        super().__init__()
        self.to_k_ip = operations.Linear(cross_attention_dim, width, bias=False, **factory)
        self.to_v_ip = operations.Linear(cross_attention_dim, width, bias=False, **factory)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class IPAdapter(nn.Module):
    """Image features to keys and values. Its `state_dict` is the official file's layout.

    `operations` supplies Linear and LayerNorm (`torch.nn`, or the host's casting ones);
    `factory` takes `device` and `dtype`.
    """

    def __init__(self, spec: AdapterSpec, *, operations: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.spec = spec
        self.lora: dict[str, Tensor] = {}  # of a FaceID file, for the model; no part of the state
        build = {"operations": operations, **factory}
        self.image_proj = PROJECTIONS[spec.variant](**spec.sizes, **build)
        # Numbered as in diffusers' attn_processors: even places are self-attention.
        self.ip_adapter = nn.ModuleDict(
            {
                str(2 * i + 1): ImageKeysValues(spec.cross_attention_dim, width, **build)
                for i, width in enumerate(spec.layer_dims)
            }
        )

    def tokens(self, *features: Tensor, structure: float = 1.0, exact: bool = False) -> Tensor:
        """Project image features to tokens `(N, tokens, cross_attention_dim)`.

        They are `(N, width)` or `(N, patches, width)`, as `spec.reads` says. `structure`: see
        `FacePerceiver`; `exact`: see `ImagePrompt.exact_faces`.
        """
        if isinstance(self.image_proj, FacePerceiver):
            return self.image_proj(*features, structure=structure, exact=exact)
        if isinstance(self.image_proj, FaceProjection):
            return self.image_proj(*features, exact=exact)
        return self.image_proj(*features)

    def keys_values(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield K' and V', each `(N, tokens, width)`, layer by layer in checkpoint order."""
        for layer in self.ip_adapter.values():
            yield layer(tokens)

    def forward(self, *features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return every layer's K' and V' of image features."""
        return list(self.keys_values(self.tokens(*features)))
