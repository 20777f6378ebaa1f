"""Variants, feature kinds and families: the words that nodes, core and training share.

Users, file names and the paper say the same things differently: a "plus" adapter is one of
fine-grained features (paper section 4.4.2), and its twin "plus-face" differs in its training alone.
"""

from __future__ import annotations

from typing import Literal, get_args

Variant = Literal["base", "plus", "full", "faceid", "faceid-plus", "faceid-unnorm", "instantx"]
"""What projects the image features: one linear layer, a resampler (fine-grained features), or an
MLP that makes every hidden state a token. Of faces: an MLP over the face embedding, that together
with a perceiver over the crop's hidden states, or a resampler over the embedding as it is. Of
InstantX's for Flux: an MLP over the image embedding."""
FeatureKind = Literal["image_embeds", "penultimate_hidden_states", "face_embeds"]
"""What a projection reads: the fields of `ImageFeatures`."""
Family = Literal["sd15", "sdxl", "flux"]
"""What adapters are published for."""

FACE: FeatureKind = "face_embeds"
FEATURE_KINDS: tuple[FeatureKind, ...] = tuple(x for x in get_args(FeatureKind) if x != FACE)
"""What an image encoder gives; a face encoder gives `FACE`."""
FAMILIES: tuple[Family, ...] = ("sd15", "sdxl")
"""Those of UNets, which adapters can be trained for here."""

VARIANT_LABELS: dict[Variant, str] = {
    "base": "base",
    "plus": "fine-grained (plus)",
    "full": "full",
    "faceid": "FaceID",
    "faceid-plus": "FaceID Plus",
    "faceid-unnorm": "FaceID Portrait Unnorm",
    "instantx": "InstantX",
}
FAMILY_LABELS: dict[Family, str] = {"sd15": "SD1.5", "sdxl": "SDXL", "flux": "Flux.1"}

Place = Literal["cross-attention", "attention output", "block output"]
"""Where a model's layer takes an image's part: beside the text's attention in a UNet; in a
transformer's attention, before its output projection; or behind a whole block."""
CROSS_ATTENTION: Place = "cross-attention"

# Width of the text states and number of layers; of Flux.1, its double blocks or all.
_SIZES: dict[tuple[int, int], Family] = {
    **{(768, 16): "sd15", (2048, 70): "sdxl"},
    **{(4096, 19): "flux", (4096, 57): "flux"},
}
_OTHER_MODELS = {(1024, 16): "SD2", (1280, 44): "SDXL Refiner"}


def family(context_dim: int, layers: int) -> Family | None:
    """Return the family with `layers` cross-attention layers over `context_dim`-wide text states.

    None for sizes that no adapter is published for.
    """
    return _SIZES.get((context_dim, layers))


def model_label(context_dim: int, layers: int, kolors: bool = False) -> str | None:
    """Return what people call a model of these sizes, or None where it has no name.

    `kolors`: whether it is Kolors, which has the layers of SDXL and another text encoder.
    """
    if kolors:
        return "Kolors"
    known = family(context_dim, layers)
    return FAMILY_LABELS[known] if known else _OTHER_MODELS.get((context_dim, layers))


def describe_model(
    context_dim: int, layers: int, kolors: bool = False, place: Place = CROSS_ATTENTION
) -> str:
    """Return name and sizes of a model for messages, or its sizes alone."""
    kind = "cross-attention layers" if place == CROSS_ATTENTION else "transformer blocks"
    sizes = f"{layers} {kind} over {context_dim}-wide text states"
    label = model_label(context_dim, layers, kolors)
    return f"{label} ({sizes})" if label else f"a model of {sizes}"
