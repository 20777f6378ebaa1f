"""From image features to the packed K'/V' that the attention adds."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import encoder_names
from .adapter import AdapterSpec, IPAdapter
from .files import published
from .variants import FEATURE_KINDS, FeatureKind

logger = logging.getLogger("comfyui_ip_adapter")
COMBINE = ("concat", "average", "per_latent")

VIT_L = "CLIP ViT-L/14"  # has quick GELU
# Encoders by the widths of those two, for descriptions and error messages: those of the published
# adapters, and the one that is often taken for theirs.
_NAMES: dict[tuple[int, ...], str] = {
    (768, 1024): VIT_L,
    **{sizes[:2]: weights.label for sizes, weights in published.ENCODERS.items()},
}
_PATCH = 14  # pixels; that of all three
QUICK_GELU = "quick GELU"
"""In the description of an encoder that has the published ones' sizes and not their activation."""
DAMAGED_ENCODER = (
    "the image encoder's weights are damaged, or half precision overflowed. Download it again, or "
    "start ComfyUI with --fp32-text-enc."
)
# For each of FEATURE_KINDS: what an adapter reads that a prompt lacks, why, and the remedy.
_LACKING: dict[FeatureKind, tuple[str, str]] = {
    "image_embeds": (
        "the encoder's image embedding",
        "its file holds no 'visual_projection.weight', so it gives none. Load the complete image "
        "encoder",
    ),
    "penultimate_hidden_states": (
        "the encoder's hidden states",
        "it is no vision transformer, so it gives none. Load the image encoder",
    ),
}


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
        """The average image, N = 1."""
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


def encoder_name(features: FeatureKind, width: int) -> str | None:
    """The published encoder whose `features` (as AdapterSpec names them) are `width` wide."""
    place = FEATURE_KINDS.index(features)
    return next((name for widths, name in _NAMES.items() if widths[place] == width), None)


def describe_encoder(features: ImageFeatures, image_size: int, quick_gelu: bool = False) -> str:
    """The encoder of these features in words; `image_size` in pixels. One that has the shapes of
    a published encoder is called by its name, unless it has `quick_gelu` where that has none."""
    widths = tuple(getattr(features, kind).shape[-1] for kind in FEATURE_KINDS)
    patches = features.penultimate_hidden_states.shape[1]
    name = _NAMES.get(widths) if patches == (image_size // _PATCH) ** 2 + 1 else None
    if quick_gelu and name is not None and name != VIT_L:
        name = f"the sizes of {name}, but {QUICK_GELU}"
    size = f"{image_size} px" if name is None else f"{name}, {image_size} px"
    return (
        f"an image encoder of {widths[1]}-wide hidden states and {widths[0]}-wide embeddings "
        f"({size})"
    )


def check_encoder(
    spec: AdapterSpec, prompt: ImagePrompt, adapter_name: str, trained_with: str | None = None
) -> None:
    """Raise ValueError if the prompt's features are not of the width that the adapter reads.

    `trained_with`: the encoder's name in the adapter's metadata. Where it is a published one, or
    nothing tells, features of the right width are compared with the published encoder of that
    width; what differs from it in other sizes or in its activation goes to the log, for an adapter
    of one's own may read it.
    """
    found = getattr(prompt.positive, spec.features).shape[-1]
    if found == spec.feature_dim:
        if expected := encoder_names.expected(trained_with, spec):
            _check_published(expected, spec, prompt, adapter_name)
        return
    if found == 0:
        read, reason = _LACKING[spec.features]
        raise ValueError(
            f"'{adapter_name}' reads {read}, but the image prompt was made with {prompt.encoder}: "
            f"{reason} that this adapter was trained with, and encode the image again."
        )
    kind = spec.features.replace("_", " ")
    encoder = trained_with or encoder_name(spec.features, spec.feature_dim) or "another encoder"
    raise ValueError(
        f"'{adapter_name}' reads {kind} {spec.feature_dim} wide, as {encoder} gives, but the "
        f"image prompt was made with {prompt.encoder}, whose {kind} are {found} wide. Load the "
        "image encoder that this adapter was trained with, and encode the image again."
    )


def _check_published(
    expected: published.Weights, spec: AdapterSpec, prompt: ImagePrompt, adapter_name: str
) -> None:
    """Warn of a prompt that has the width of a published encoder and is of another one."""
    sizes = [sizes for sizes, known in published.ENCODERS.items() if known is expected]
    embed = prompt.positive.image_embeds.shape[1]
    patches, hidden = prompt.positive.penultimate_hidden_states.shape[1:]
    # The projection may have been left out of the encoder's file.
    same = (k[1:] == (hidden, patches) and embed in (0, k[0]) for k in sizes)
    if QUICK_GELU in prompt.encoder or not any(same):
        _warn_once(
            f"'{adapter_name}' reads {spec.features.replace('_', ' ')} {spec.feature_dim} wide, "
            f"as {expected.label} gives. The image prompt's are as wide, but of "
            f"another encoder: {prompt.encoder}. Unless the adapter was trained with that one, the "
            "result follows the image badly: load the adapter's own image encoder, and encode the "
            "image again."
        )


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)


def tokens(adapter: IPAdapter, prompt: ImagePrompt, combine: str) -> tuple[Tensor, Tensor]:
    """Tokens of both sides, `(R, T, cross_attention_dim)`.

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
        positive, negative = positive.flatten(0, 1)[None], negative.flatten(0, 1)[None]
        # Repeating every token equally often leaves the softmax's result as it is.
        length = max(positive.shape[1], negative.shape[1])
        positive, negative = (
            x if length % x.shape[1] else x.repeat(1, length // x.shape[1], 1)
            for x in (positive, negative)
        )
    elif negative.shape[0] not in (1, positive.shape[0]):
        raise ValueError(
            f"per_latent takes one negative image, or one for each image; found "
            f"{positive.shape[0]} images and {negative.shape[0]} negative images."
        )
    return positive, negative


def layer_weights(spec: AdapterSpec, weight: float, layers: Sequence[float] | None) -> list[float]:
    """λ of every layer, in checkpoint order. Raises ValueError for what is not finite, or for a
    list of another length than the adapter has layers."""
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
    """λ goes into V', and all layers into one tensor `(R, T, 2·Σ widths)`: K'₀ V'₀ K'₁ V'₁ …"""
    parts: list[Tensor] = []
    for (key, value), weight in zip(keys_values, weights, strict=True):
        parts += key, value * weight
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, layer_dims: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The inverse of `fold`: views of K' and V' of each layer."""
    parts = packed.split([dim for dim in layer_dims for _ in "kv"], dim=-1)
    return list(zip(parts[::2], parts[1::2], strict=True))


def split_values(packed: Tensor, layer_dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`packed` with zeros for V', and with zeros for K': the one plus any multiple of the other is
    the same prompt with another λ."""
    widths = torch.tensor([dim for dim in layer_dims for _ in "kv"])
    columns = torch.tensor([False, True] * len(layer_dims)).repeat_interleave(widths)
    values = packed * columns.to(packed)
    return packed - values, values
