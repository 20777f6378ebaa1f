"""A model and a preset to an adapter and its image encoder, among the files that are there."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import comfy.clip_vision
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher

from ..compatibility import fits
from ..files import finder
from ..files.finder import (
    ADAPTER_PRESETS,
    AdapterFile,
    AdapterPreset,
    Choice,
    EncoderFile,
    File,
    Folder,
    Search,
    Unusable,
)
from ..files.tower_config import ImageEncoderError
from .layers import layers_of
from .open_clip import load_image_encoder

logger = logging.getLogger("comfyui_ip_adapter")


def find(model: ModelPatcher, preset: str, adapters: Folder, encoders: Folder) -> Choice:
    """Find the best adapter for model and preset that has its encoder beside it.

    Reads headers only. Raises ValueError for a model without UNet cross-attention, and
    FileNotFoundError, which says what to get, where a file is missing.
    """
    if preset not in ADAPTER_PRESETS:
        raise ValueError(f"preset is {preset!r}; expected one of {', '.join(ADAPTER_PRESETS)}.")
    wanted, name = ADAPTER_PRESETS[preset], type(model.model).__name__
    layers = layers_of(model)
    found = finder.adapters(adapters.files)
    seen = [_loadable(file) for file in finder.encoders(encoders.files)]
    fitting = [file for file in _of_kind(found, wanted) if fits(file.spec, layers)]
    unusable = [file for file in found if isinstance(file, Unusable)]
    choice = finder.choose(fitting, _usable(seen), wanted, unusable)
    if choice is None:
        folders = replace(adapters, files=tuple(found)), replace(encoders, files=tuple(seen))
        search = Search(name, layers[0].context_dim, len(layers), wanted, *folders)
        raise FileNotFoundError(search.message(fitting))
    logger.info("Preset '%s': %s", preset, "; ".join(choice.chosen()))
    for doubt in choice.doubts:
        logger.warning("Preset '%s': %s.", preset, doubt)
    return choice


def fingerprint(preset: str | None, adapters: Folder, encoders: Folder) -> str:
    """Changes with the files that `find` may take for any model, and with configurations beside
    them: the preset's kind of adapter (None: all kinds), and the encoders of these."""
    kinds = _of_kind(finder.adapters(adapters.files), ADAPTER_PRESETS.get(preset or ""))
    specs = {file.spec for file in kinds}
    theirs = [
        file
        for file in _usable(finder.encoders(encoders.files))
        if any(map(file.sizes.gives, specs))
    ]
    return finder.digest(finder.stamps(file.path) for file in (*kinds, *theirs))


def describe(choice: Choice) -> str:
    """A line for the adapter and one for the encoder, what they are and why these; then one for
    each doubt."""
    return "\n".join([*choice.chosen(), *(f"In doubt: {doubt}." for doubt in choice.doubts)])


def load_encoder(file: EncoderFile) -> ClipVisionModel:
    """The encoder as the host's CLIP_VISION. Raises ImageEncoderError."""
    if file.sizes.layout == "open_clip":
        return load_image_encoder(file.path)
    encoder = comfy.clip_vision.load(file.path)
    if encoder is None:
        raise ImageEncoderError(f"Image encoder '{file.name}' is of a size ComfyUI does not know.")
    return encoder


def _of_kind(files: Iterable[File], preset: AdapterPreset | None) -> list[AdapterFile]:
    """The adapters of the preset's variant; of any where there is no preset."""
    return [
        file
        for file in files
        if isinstance(file, AdapterFile) and (preset is None or file.spec.variant == preset.variant)
    ]


def _usable(files: Iterable[File]) -> list[EncoderFile]:
    return [file for file in files if isinstance(file, EncoderFile)]


def _loadable(file: EncoderFile | Unusable) -> EncoderFile | Unusable:
    """The same file, or why the host's own loader cannot take it."""
    if isinstance(file, Unusable) or file.sizes.layout == "open_clip":
        return file
    sizes = file.sizes
    found = sizes.hidden_dim, sizes.layers, sizes.mlp_dim, sizes.positions
    known = _hosts_sizes()
    if found in known and sizes.embed_dim in (0, known[found]):
        return file
    reason = (
        f"'{file.name}' is an image encoder in transformers' layout of a size that ComfyUI does "
        f"not know ({sizes.layers} layers {sizes.hidden_dim} wide, {sizes.positions} positions, "
        f"image embeds {sizes.embed_dim} wide)."
    )
    return Unusable(file.name, file.path, reason)


@functools.cache
def _hosts_sizes() -> dict[tuple[int, int, int, int], int]:
    """Of each CLIP that the host's loader knows: width, layers, MLP's width, positions; width of
    the embedding."""
    found = {}
    for path in Path(comfy.clip_vision.__file__).parent.glob("clip_vision_config_*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        positions = (config["image_size"] // config["patch_size"]) ** 2 + 1
        sizes = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
        found[(*sizes, positions)] = config["projection_dim"]
    return found
