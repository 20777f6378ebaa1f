"""Check that an adapter fits a model, and that a prompt's image encoder is the adapter's."""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Protocol

from .adapter import AdapterSpec
from .files import published
from .files.adapter_file import EXTENSIONS
from .image_prompt import QUICK_GELU, UNNAMED, ImagePrompt
from .variants import CROSS_ATTENTION, FACE, FeatureKind, describe_model

logger = logging.getLogger("comfyui_ip_adapter")
# What an adapter reads that a prompt lacks, why, and the remedy.
_LACKING: dict[FeatureKind, tuple[str, str]] = {
    "image_embeds": (
        "the encoder's image embedding",
        "its file holds no 'visual_projection.weight' (of SigLIP: no 'vision_model.head.…', or is "
        "no .safetensors file in models/clip_vision), so it gives none. Load the complete image "
        "encoder",
    ),
    "penultimate_hidden_states": (
        "the encoder's hidden states",
        "it is no vision transformer, so it gives none. Load the image encoder",
    ),
    FACE: (
        "a face embedding",
        "it has none. Take Encode Face in place of Encode Image Prompt, with the face encoder",
    ),
}
_OPEN_CLIP = "open_clip:"  # as training's settings begin: MODEL/WEIGHTS, MODEL@FILE or FILE
# What the files and folders of any encoder are called.
_GENERIC = {
    *(("image", "encoder"), ("vision", "encoder"), ("clip", "vision"), ("model",)),
    *(("pytorch", "model"), ("open", "clip", "model"), ("open", "clip", "pytorch", "model")),
}


class CrossAttention(Protocol):
    """A cross-attention layer of a model: its name in messages, its width and its text's."""

    @property
    def key(self) -> Any: ...
    @property
    def dim(self) -> int: ...
    @property
    def context_dim(self) -> int: ...


def fits(spec: AdapterSpec, layers: Sequence[CrossAttention], kolors: bool = False) -> bool:
    """Return whether the adapter has W'k, W'v for exactly these layers, of that text encoder."""
    widths = tuple(layer.dim for layer in layers)
    return (
        bool(layers)
        and (layers[0].context_dim, widths) == (spec.cross_attention_dim, spec.layer_dims)
        and spec.kolors is kolors
    )


def check_fits(
    spec: AdapterSpec,
    adapter_name: str,
    model_name: str,
    layers: Sequence[CrossAttention],
    kolors: bool = False,
) -> None:
    """Raise ValueError unless the adapter has W'k, W'v for exactly this model's `layers`.

    `kolors`: see `describe_model`.
    """
    wanted = spec.cross_attention_dim, len(spec.layer_dims), spec.kolors
    made_for = describe_model(*wanted, spec.place)
    sought = "UNet cross-attention layers"
    if spec.place != CROSS_ATTENTION:
        sought = "transformer blocks of Flux.1"
    if not layers:
        raise ValueError(
            f"'{adapter_name}' was made for {made_for}, but the connected model ({model_name}) "
            f"has no {sought}. IP-Adapters work with models of the SD1.5, SDXL and Flux.1 "
            "families, each with those made for it."
        )
    found = layers[0].context_dim, len(layers), kolors
    if found != wanted:
        raise ValueError(
            f"'{adapter_name}' was made for {made_for}, but the connected model ({model_name}) "
            f"is {describe_model(*found, spec.place)}. Connect a model of the adapter's family, or "
            "load an adapter made for this one."
        )
    pairs = zip(spec.numbers, layers, spec.layer_dims, strict=True)
    for number, (tensor, layer, width) in enumerate(pairs):
        if layer.dim != width:
            raise ValueError(
                f"'{adapter_name}' does not fit the connected model ({model_name}): its layer "
                f"{number} (tensor ip_adapter.{tensor}) is {width} wide, but the model's "
                f"{layer.key} is {layer.dim} wide. Load an adapter made for this model."
            )


def check_encoder(
    spec: AdapterSpec, prompt: ImagePrompt, adapter_name: str, trained_with: str | None = None
) -> None:
    """Raise ValueError if the prompt's features are not of the width that the adapter reads.

    Features of the right width are compared with the published encoder that `trained_with` names,
    or with the one of that width if nothing tells; what differs from it in other sizes or in its
    activation goes to the log, for an adapter of one's own may read it.

    Args:
        spec: What the adapter reads.
        prompt: The image prompt, which describes its encoder.
        adapter_name: For messages.
        trained_with: The encoder's name in the adapter's metadata.
    """
    for read in spec.reads:
        _check_width(spec, read, prompt, adapter_name, trained_with)
    if FACE in spec.reads and "'antelopev2'" in prompt.encoder:
        _warn_once(
            f"'{adapter_name}' reads face embeddings of buffalo_l; the image prompt's are of "
            "antelopev2, which are as wide and mean other faces. Unless the adapter was trained "
            "with those, load buffalo_l in Load Face Encoder."
        )
    if prompt.encoder == UNNAMED or FACE in spec.reads:
        return
    kind = spec.features.replace("_", " ")
    expected = expected_encoder(spec, trained_with)
    patches, hidden = prompt.positive.penultimate_hidden_states.shape[1:]
    sizes = prompt.positive.image_embeds.shape[1], hidden, patches
    if expected and (QUICK_GELU in prompt.encoder or not published.has_sizes(expected, *sizes)):
        _warn_once(
            f"'{adapter_name}' reads {kind} {spec.feature_dim} wide, as {expected.label} gives. "
            f"The image prompt's are as wide, but of another encoder: {prompt.encoder}. Unless the "
            "adapter was trained with that one, the result follows the image badly: load the "
            "adapter's own image encoder, and encode the image again."
        )


def _check_width(
    spec: AdapterSpec,
    kind: FeatureKind,
    prompt: ImagePrompt,
    adapter_name: str,
    trained_with: str | None,
) -> None:
    name, expected = kind.replace("_", " "), spec.width(kind)
    width = prompt.positive.of(kind).shape[-1]
    if width == 0:
        read, reason = _LACKING[kind]
        if kind != FACE and FACE in spec.reads and prompt.positive.face_embeds is not None:
            raise ValueError(
                f"'{adapter_name}' reads the face's crop beside its embedding, but the image "
                f"prompt was made with {prompt.encoder} alone. Connect a Load CLIP Vision (CLIP "
                "ViT-H/14) to 'clip_vision' of Encode Face, and the crop to 'image' where the "
                "embeddings come from elsewhere."
            )
        raise ValueError(
            f"'{adapter_name}' reads {read}, but the image prompt was made with {prompt.encoder}: "
            f"{reason} that this adapter was trained with, and encode the image again."
        )
    if width != expected:
        label = published.encoder_label(kind, expected)
        raise ValueError(
            f"'{adapter_name}' reads {name} {expected} wide, as "
            f"{trained_with or label or 'another encoder'} gives, but the image prompt was made "
            f"with {prompt.encoder}, whose {name} are {width} wide. Load the image encoder that "
            "this adapter was trained with, and encode the image again."
        )


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)


def expected_encoder(spec: AdapterSpec, trained_with: str | None) -> published.Weights | None:
    """Return the published encoder that an adapter was trained with; None if it is another one.

    `trained_with` is a name in the adapter's metadata, perhaps open_clip's tag of the weights.
    Where it tells nothing, it is the published encoder whose features are as wide as `spec` reads.
    """
    name = words(trained_with)
    if not name:
        theirs = published.encoder(spec.features, spec.feature_dim, spec.place)
        return published.VIT_L_336 if spec.kolors else theirs
    known = {weights.name: weights for weights in published.ENCODERS.values()} | published.TAGS
    return next((w for key, w in known.items() if within(words_of_file(key), name)), None)


def words(trained_with: str | None) -> tuple[str, ...]:
    """Return the words of an encoder's name in metadata; none where they tell nothing."""
    name = trained_with or ""
    if name.startswith(_OPEN_CLIP):
        name = re.split("[@:]", name)[-1]
    parts = words_of_file(name)
    return () if parts in _GENERIC else parts


@functools.lru_cache(maxsize=4096)
def words_of_file(name: str) -> tuple[str, ...]:
    """Return the words of a file's name, without its ending, in lower case."""
    path = PurePath(name)
    bare = path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path
    return tuple(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", str(bare)).casefold()))


def within(some: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Return whether `some` stand side by side among `others`."""
    starts = range(len(others) - len(some) + 1)
    return any(others[i : i + len(some)] == some for i in starts)
