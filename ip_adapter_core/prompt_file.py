"""Image prompts as files: safetensors that hold float32 features and say of which encoder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from .files.atomic import atomic
from .files.header import few
from .image_prompt import DAMAGED_ENCODER, ImageFeatures, ImagePrompt
from .variants import FACE, FEATURE_KINDS

SUFFIX = ".safetensors"
FORMAT = "image_prompt_format"  # the entry of the metadata that tells these files from others
VERSION = "2"
WITH_FACES = "2 with faces"
WITH_BLACK = "2 with black"  # the embedding of a black picture
WEIGHTS_ALONE = "1"  # the version whose fingerprints leave the encoder's settings out
SIDES = ("positive", "negative")
KEYS = tuple(f"{side}.{kind}" for side in SIDES for kind in FEATURE_KINDS)
BLACK = "black.image_embeds"
FACE_KEYS = tuple(f"{side}.{FACE}" for side in SIDES)
_EXPECTED = {
    VERSION: KEYS,
    WEIGHTS_ALONE: KEYS,
    WITH_FACES: (*KEYS, *FACE_KEYS),
    WITH_BLACK: (*KEYS, BLACK),
}


class PromptFileError(ValueError):
    """A file that is no usable image prompt. The message names file, finding and remedy."""


def save(
    prompt: ImagePrompt, path: str | os.PathLike[str], more: Mapping[str, str] | None = None
) -> None:
    """Write a prompt to a new file `path`, which is never half-written; `more`: further metadata.

    Raises FileExistsError where there is such a file, which stays as it is, and PromptFileError for
    features that `load` would refuse, or a file that cannot be written.
    """
    path = Path(path)
    # Clones: safetensors refuses tensors that share memory, as equal sides may.
    face = prompt.positive.face_embeds is not None
    features = {
        f"{side}.{kind}": getattr(prompt, side).of(kind)
        for side in SIDES
        for kind in (*FEATURE_KINDS, *([FACE] if face else []))
    }
    if prompt.black is not None and not face:
        features[BLACK] = prompt.black
    tensors = {
        key: x.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        for key, x in features.items()
    }
    remedy = f"Encode the image again. If that does not help: {DAMAGED_ENCODER}"
    _check(tensors, path.name, remedy)
    metadata = {
        **(more or {}),
        FORMAT: WITH_FACES if face else WITH_BLACK if BLACK in tensors else VERSION,
        "encoder": prompt.encoder,
        "encoder_fingerprint": prompt.fingerprint,
        **({"structure": repr(prompt.structure)} if face else {}),
    }
    try:
        path.touch(exist_ok=False)  # takes the name: renaming asks no one
        try:
            with atomic(path) as temporary:
                temporary.write_bytes(serialize(tensors, metadata))
        except BaseException:
            path.unlink()
            raise
    except FileExistsError:
        raise
    except OSError as error:
        raise PromptFileError(f"'{path}' cannot be written: {error.strerror}.") from error


def load(path: str | os.PathLike[str]) -> ImagePrompt:
    """Read a prompt that `save` wrote, to the bit.

    Raises PromptFileError for everything that is not a complete and finite prompt.
    """
    name = os.path.basename(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(metadata, list(file.keys()), name)
            # Clones: the file may be replaced while they live.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PromptFileError(
            f"'{name}' is no whole safetensors file ({error}); expected one of Save Image Prompt. "
            "It was cut short, or is something else: save the prompt again."
        ) from error
    except OSError as error:
        found = error.strerror or str(error)
        raise PromptFileError(f"'{path}' cannot be read: {found}.") from error
    _check(tensors, name, "The file is damaged, or was made by something else.")
    kinds = (*FEATURE_KINDS, *([FACE] if metadata[FORMAT] == WITH_FACES else []))
    positive, negative = (
        ImageFeatures(*(tensors[f"{side}.{kind}"] for kind in kinds)) for side in SIDES
    )
    known = metadata[FORMAT] != WEIGHTS_ALONE
    fingerprint = metadata.get("encoder_fingerprint", "") if known else ""
    try:
        structure = float(metadata.get("structure", 1.0))
        if not math.isfinite(structure):
            raise ValueError(structure)
    except ValueError as error:
        raise PromptFileError(
            f"'{name}' has the structure {metadata['structure']!r}; expected a finite number. Save "
            "the prompt again."
        ) from error
    made = ImagePrompt(positive, negative, metadata["encoder"], fingerprint, structure)
    return replace(made, black=tensors.get(BLACK))


def _check_kind(metadata: Mapping[str, str], keys: list[str], name: str) -> None:
    """Before any tensor is read: a foreign file may be a model of gigabytes."""
    if FORMAT not in metadata or "encoder" not in metadata:
        raise PromptFileError(
            f"'{name}' is no image prompt: its metadata lacks '{FORMAT}' or 'encoder'. Found "
            f"{len(keys)} tensors: {few(keys)}. Choose a file of Save Image Prompt."
        )
    if metadata[FORMAT] not in _EXPECTED:
        raise PromptFileError(
            f"'{name}' is an image prompt of format {metadata[FORMAT]!r}; expected {VERSION!r}. "
            "It was saved by another version of this pack: update the pack, or save it again."
        )
    expected = _EXPECTED[metadata[FORMAT]]
    if sorted(keys) != sorted(expected):
        raise PromptFileError(
            f"'{name}' holds the tensors {few(sorted(keys))}; expected {', '.join(expected)}. "
            "Save the prompt again."
        )


def _check(tensors: Mapping[str, Tensor], name: str, remedy: str) -> None:
    for key, tensor in tensors.items():
        dimensions = 3 if key.endswith(FEATURE_KINDS[1]) else 2
        if tensor.ndim != dimensions or tensor.shape[0] == 0:
            wanted = "[images, width]" if dimensions == 2 else "[images, patches, width]"
            raise PromptFileError(
                f"'{name}': '{key}' has shape {list(tensor.shape)}; expected {wanted}, at least "
                f"one image. {remedy}"
            )
        if tensor.dtype != torch.float32:
            raise PromptFileError(
                f"'{name}': '{key}' is stored as {tensor.dtype}; expected float32. {remedy}"
            )
        if not tensor.isfinite().all():
            raise PromptFileError(f"'{name}': '{key}' contains NaN or infinite values. {remedy}")
    kinds = [kind for kind in (*FEATURE_KINDS, FACE) if f"positive.{kind}" in tensors]
    for side in SIDES:
        embeds, *others = (tensors[f"{side}.{kind}"].shape[0] for kind in kinds)
        for kind, other in zip(kinds[1:], others, strict=True):
            if other != embeds:
                what = "hidden states" if kind != FACE else "face embeddings"
                raise PromptFileError(
                    f"'{name}': {side} has embeddings of {embeds} images and {what} of "
                    f"{other}; expected equal numbers. {remedy}"
                )
    black = tensors.get(BLACK)
    width = tensors[KEYS[0]].shape[1]
    if black is not None and black.shape != (1, width):
        raise PromptFileError(
            f"'{name}': '{BLACK}' has shape {[*black.shape]}; expected {[1, width]}. {remedy}"
        )
    for kind in kinds:
        image, against = (tensors[f"{side}.{kind}"].shape for side in SIDES)
        if image[1:] != against[1:]:
            raise PromptFileError(
                f"'{name}': {kind} has shape {[*image]} on the positive and {[*against]} on the "
                f"negative side; expected the same but for the number of images. {remedy}"
            )
