"""The adapter itself: a projection into tokens, and W'k, W'v for every cross-attention layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from .face_projection import FacePerceiver, FaceProjection, FaceResampler
from .projection import ImageProjection, MLPProjection, Projection, TokensMLP
from .resampler import Resampler
from .variants import CROSS_ATTENTION, FeatureKind, Place, Variant

PROJECTIONS: dict[Variant, type[Projection]] = {
    "base": ImageProjection,
    "plus": Resampler,
    "full": MLPProjection,
    "faceid": FaceProjection,
    "faceid-plus": FacePerceiver,
    "faceid-unnorm": FaceResampler,
    "instantx": TokensMLP,
}
_KOLORS_DIM = 2048  # of its resampler; SDXL's has 1280


@dataclass(frozen=True)
class AdapterSpec:
    """What a checkpoint is, read off its tensors' shapes.

    `projection_sizes` are the arguments of the variant's class in `PROJECTIONS`.
    `layer_dims` holds the width of K' and V' of each cross-attention layer in checkpoint order
    (down, up, middle: the order of diffusers' `unet.attn_processors`; of Flux.1 double, single).
    `place`: where in a layer its part is added, which goes with how W'k and W'v are made.
    """

    variant: Variant
    projection_sizes: tuple[tuple[str, int], ...]
    layer_dims: tuple[int, ...]
    place: Place = CROSS_ATTENTION

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
    def numbers(self) -> range:
        """Of the layers in a file: as in diffusers' attn_processors, even ones self-attention."""
        count = len(self.layer_dims)
        return range(1, 2 * count, 2) if self.place == CROSS_ATTENTION else range(count)

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

    bias: ClassVar[bool] = False

    def __init__(
        self, cross_attention_dim: int, width: int, *, operations: Any = nn, **factory: Any
    ) -> None:
        super().__init__()
        sizes = cross_attention_dim, width
        self.to_k_ip = operations.Linear(*sizes, bias=self.bias, **factory)
        self.to_v_ip = operations.Linear(*sizes, bias=self.bias, **factory)

    def forward(self, tokens: Tensor, dim_head: int | None = None) -> tuple[Tensor, Tensor]:
        """`dim_head`: width of the model's attention heads, for those that go by it."""
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class BiasedKeysValues(ImageKeysValues):
    """The same with a bias: XLabs' for Flux, `x-flux/src/flux/modules/layers.py`."""

    bias = True


class NormedKeysValues(ImageKeysValues):
    """The same, and K' normed over each head, without weights: InstantX's for Flux.

    V' is not. (A pack for ComfyUI norms it too, which the published function does not.)
    """

    def forward(self, tokens: Tensor, dim_head: int | None = None) -> tuple[Tensor, Tensor]:
        if dim_head is None:
            raise ValueError("K' of InstantX's adapters is normed over heads: give their width.")
        key, value = super().forward(tokens)
        heads = rearrange(key, "n t (h d) -> n t h d", d=dim_head)
        return rearrange(rms_norm(heads, (dim_head,), eps=1e-5), "n t h d -> n t (h d)"), value


KEYS_VALUES: dict[Place, type[ImageKeysValues]] = {
    CROSS_ATTENTION: ImageKeysValues,
    "block output": BiasedKeysValues,
    "attention output": NormedKeysValues,
}


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
        kind, width_of_text = KEYS_VALUES[spec.place], spec.cross_attention_dim
        self.ip_adapter = nn.ModuleDict(
            {
                str(number): kind(width_of_text, width, **build)
                for number, width in zip(spec.numbers, spec.layer_dims, strict=True)
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

    def keys_values(
        self, tokens: Tensor, dim_head: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield K' and V', each `(N, tokens, width)`, layer by layer in checkpoint order.

        `dim_head`: see `NormedKeysValues`.
        """
        for number in self.spec.numbers:  # in training a LoRA lies at the places between
            yield self.ip_adapter[str(number)](tokens, dim_head)

    def forward(self, *features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return every layer's K' and V' of image features."""
        return list(self.keys_values(self.tokens(*features)))
