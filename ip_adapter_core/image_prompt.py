"""Image prompts as values: what an image encoder says of images, and which encoder it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .files import published
from .variants import FEATURE_KINDS, FeatureKind

_PATCH = 14  # pixels; that of all encoders that have a label
QUICK_GELU = "quick GELU"
"""In the description of an encoder that has the published ones' sizes and not their activation."""
UNNAMED = "an encoder that is not known"
"""What stands for the encoder of bare features, as other packs pass them on."""
DAMAGED_ENCODER = (
    "the image encoder's weights are damaged, or half precision overflowed. Download it again, or "
    "start ComfyUI with --fp32-text-enc."
)


@dataclass(frozen=True)
class ImageFeatures:
    """What an image encoder says of N images.

    `image_embeds (N, embed_dim)`, embed_dim 0 where the encoder has no projection;
    `penultimate_hidden_states (N, patches, hidden_dim)`. Of faces: `face_embeds (N, 512)` as the
    face encoder gives them, not normalised; then the others are those of the faces' crops.
    """

    image_embeds: Tensor
    penultimate_hidden_states: Tensor
    face_embeds: Tensor | None = None

    def __len__(self) -> int:
        return self.image_embeds.shape[0]

    def of(self, kind: FeatureKind) -> Tensor:
        """Return the features of a kind, 0 wide where there are none."""
        found: Tensor | None = getattr(self, kind)
        return self.image_embeds[:, :0] if found is None else found

    def mean(self) -> ImageFeatures:
        """Return the average image, N = 1; faces by their directions, which tell who it is."""
        made = self._map(lambda x: x.mean(0, keepdim=True))
        if self.face_embeds is None:
            return made
        lengths = self.face_embeds.norm(dim=-1, keepdim=True)
        directions = self.face_embeds / lengths.where(lengths > 0, 1.0)
        face = directions.mean(0, keepdim=True) * lengths.mean(0, keepdim=True)
        return replace(made, face_embeds=face)

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageFeatures:
        return self._map(lambda x: x.to(device, dtype))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ImageFeatures:
        face = None if self.face_embeds is None else function(self.face_embeds)
        embeds, states = map(function, (self.image_embeds, self.penultimate_hidden_states))
        return ImageFeatures(embeds, states, face)


@dataclass(frozen=True)
class ImagePrompt:
    """N images as an encoder sees them, and what stands against them in guidance.

    `negative` is the zero image as in training (zero embedding; features of zero *normalised*
    pixels) or an image of the user's. Knows neither λ nor model: any adapter of the same
    encoder can use it. `encoder` describes the encoder to people; `fingerprint` is the same for
    the same encoder only, and empty where nothing is known of its weights. `structure`: how much
    of a face's crop FaceID Plus v2 follows beside its embedding. `exact_faces`: face embeddings are
    projected as long as they are, in place of length 1. `black (1, embed_dim)`: the embedding of a
    black picture, where `negative` is the zero image; adapters for Flux know no zero image.
    """

    positive: ImageFeatures
    negative: ImageFeatures
    encoder: str
    fingerprint: str = ""
    structure: float = 1.0
    exact_faces: bool = False
    black: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> ImagePrompt:
        black = None if self.black is None else self.black.to(device, dtype)
        positive, negative = (side.to(device, dtype) for side in (self.positive, self.negative))
        return replace(self, positive=positive, negative=negative, black=black)


def bare(kind: FeatureKind, positive: Tensor, negative: Tensor) -> ImagePrompt:
    """Return a prompt of one kind of features, of an encoder that nothing is known of."""

    def side(features: Tensor) -> ImageFeatures:
        count = len(features)
        none = {"image_embeds": (count, 0), "penultimate_hidden_states": (count, 0, 0)}
        made = {k: features.new_zeros(shape) for k, shape in none.items()}
        return ImageFeatures(**{**made, kind: features})

    return ImagePrompt(side(positive), side(negative), UNNAMED)


def describe_encoder(features: ImageFeatures, image_size: int, quick_gelu: bool = False) -> str:
    """Describe the encoder of these features in words; `image_size` in pixels.

    One that has the shapes of a published encoder is called by its name, unless it has
    `quick_gelu` where that has none.
    """
    embed, hidden = (getattr(features, kind).shape[-1] for kind in FEATURE_KINDS)
    patches = features.penultimate_hidden_states.shape[1]
    label = published.LABELS.get((embed, hidden))
    expected = (image_size // _PATCH) ** 2 + (label != published.SIGLIP.label)  # no class token
    if patches != expected:
        label = None
    if quick_gelu and label is not None and label != published.VIT_L.label:
        label = f"the sizes of {label}, but {QUICK_GELU}"
    size = f"{image_size} px" if label is None else f"{label}, {image_size} px"
    return f"an image encoder of {hidden}-wide hidden states and {embed}-wide embeddings ({size})"
