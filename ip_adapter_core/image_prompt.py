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
    `penultimate_hidden_states (N, patches, hidden_dim)`.
    """

    image_embeds: Tensor
    penultimate_hidden_states: Tensor

    def __len__(self) -> int:
        return self.image_embeds.shape[0]

    def mean(self) -> ImageFeatures:
        """Return the average image, N = 1."""
        return self._map(lambda x: x.mean(0, keepdim=True))

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageFeatures:
        return self._map(lambda x: x.to(device, dtype))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ImageFeatures:
        return ImageFeatures(function(self.image_embeds), function(self.penultimate_hidden_states))


@dataclass(frozen=True)
class ImagePrompt:
    """N images as an encoder sees them, and what stands against them in guidance.

    `negative` is the zero image as in training (zero embedding; features of zero *normalised*
    pixels) or an image of the user's. Knows neither λ nor model: any adapter of the same
    encoder can use it. `encoder` describes the encoder to people; `fingerprint` is the same for
    the same encoder only, and empty where nothing is known of its weights.
    """

    positive: ImageFeatures
    negative: ImageFeatures
    encoder: str
    fingerprint: str = ""

    def to(self, device: torch.device, dtype: torch.dtype) -> ImagePrompt:
        return replace(
            self, positive=self.positive.to(device, dtype), negative=self.negative.to(device, dtype)
        )


def bare(kind: FeatureKind, positive: Tensor, negative: Tensor) -> ImagePrompt:
    """Return a prompt of one kind of features, of an encoder that nothing is known of."""

    def side(features: Tensor) -> ImageFeatures:
        count = len(features)
        none = {"image_embeds": (count, 0), "penultimate_hidden_states": (count, 0, 0)}
        others = {k: features.new_zeros(shape) for k, shape in none.items() if k != kind}
        return ImageFeatures(**{kind: features, **others})

    return ImagePrompt(side(positive), side(negative), UNNAMED)


def describe_encoder(features: ImageFeatures, image_size: int, quick_gelu: bool = False) -> str:
    """Describe the encoder of these features in words; `image_size` in pixels.

    One that has the shapes of a published encoder is called by its name, unless it has
    `quick_gelu` where that has none.
    """
    embed, hidden = (getattr(features, kind).shape[-1] for kind in FEATURE_KINDS)
    patches = features.penultimate_hidden_states.shape[1]
    label = published.LABELS.get((embed, hidden))
    if patches != (image_size // _PATCH) ** 2 + 1:
        label = None
    if quick_gelu and label is not None and label != published.VIT_L:
        label = f"the sizes of {label}, but {QUICK_GELU}"
    size = f"{image_size} px" if label is None else f"{label}, {image_size} px"
    return f"an image encoder of {hidden}-wide hidden states and {embed}-wide embeddings ({size})"
