"""Adapters and image encoders from files, under ComfyUI's memory management.

ComfyUI's own loader recognises five sizes of image encoder. For files in open_clip's layout the
sizes come from the file's configuration, so that any tower goes: plain CLIP vision transformers
become ComfyUI's own model, all others (ConvNeXt, ResNet, attention pooling, timm's) run as
open_clip has them. `find_files` chooses adapter and encoder for a model and a preset.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import comfy.clip_vision
import comfy.model_management as memory
import comfy.model_patcher
import comfy.ops
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..adapter import AdapterSpec, IPAdapter
from ..compatibility import fits
from ..files import adapter_file as checkpoint
from ..files import finder, trained_layouts
from ..files.encoder_file import MEAN, STD, VISUAL, build, fitting, read, tensors
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
from ..files.header import file_format, read_header
from ..files.tower_config import ImageEncoderError, Tower, check_whole
from ..image_prompt import ImagePrompt
from ..packing import LayerFolding, Packed, compile_sides
from ..variants import CROSS_ATTENTION
from . import host
from .layers import is_kolors, layers_by_place, layers_of, name_of
from .siglip import MODEL_TYPE as SIGLIP

logger = logging.getLogger("comfyui_ip_adapter")
_UNKNOWN_SIZE = (
    "its tensors are named as in transformers, in a size that ComfyUI does not know. Save the "
    "open_clip model instead, with its configuration"
)
_CONVERTED_LAYERS = 48  # that ComfyUI's conversion of names goes through


@dataclass(frozen=True)
class ManagedAdapter:
    """An `IPAdapter`, where it came from, and the patcher that moves it between devices.

    `trained_with`: the image encoder's name, where this repository's training noted it.
    """

    name: str
    module: IPAdapter
    patcher: comfy.model_patcher.ModelPatcher
    trained_with: str | None = None

    @property
    def spec(self) -> AdapterSpec:
        return self.module.spec

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Keep the adapter on the compute device within, and only there."""
        room = {}
        if self.spec.place != CROSS_ATTENTION:
            # A weight is cast to float32 beside it: of InstantX's largest 4.8 GB.
            largest = max(weight.numel() for weight in self.module.parameters())
            room["memory_required"] = 4 * largest
        memory.load_models_gpu([self.patcher], **room)
        try:
            yield
        finally:
            host.unload(self.patcher)

    def compile(
        self,
        image_prompt: ImagePrompt,
        folding: LayerFolding,
        combine: str,
        dtype: torch.dtype = torch.float32,
        dim_head: int | None = None,
    ) -> tuple[Packed, Packed | None]:
        """Packed K'/V' of the image and of its negative, of `dtype` on the CPU.

        The adapter must be `loaded`. `dim_head` as in `compile_sides`. Raises ValueError for what
        `packing.tokens` refuses.
        """
        prompt = image_prompt.to(self.patcher.load_device, torch.float32)
        positive, negative = compile_sides(self.module, prompt, combine, folding, dim_head)
        cpu = torch.device("cpu"), dtype
        return positive.to(*cpu), None if negative is None else negative.to(*cpu)


def load_adapter(path: str | os.PathLike[str]) -> ManagedAdapter:
    """Read a checkpoint for use in ComfyUI. Raises CheckpointError."""
    module = checkpoint.load(path, operations=comfy.ops.manual_cast)
    trained_with = None
    if file_format(path) == "safetensors":
        trained_with = checkpoint.trained_with(read_header(path)[1])
    return _managed(os.path.basename(path), module, trained_with)


def _managed(name: str, module: IPAdapter, trained_with: str | None = None) -> ManagedAdapter:
    module.requires_grad_(False)
    patcher = host.CoreModelPatcher(
        module, load_device=memory.get_torch_device(), offload_device=torch.device("cpu")
    )
    return ManagedAdapter(name, module, patcher, trained_with)


Tensors: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""An adapter as the IPADAPTER socket of other packs has it: `image_proj` and `ip_adapter`, each a
mapping of short names to tensors."""
_managed_by_tensor: Any = WeakTensorKeyDictionary()


def tensors_of(adapter: ManagedAdapter) -> dict[str, Any]:
    """Return an adapter's tensors as other packs pass them on; `adapter_of` knows them again."""
    parts: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in {**adapter.module.state_dict(), **adapter.module.lora}.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    _managed_by_tensor[_first(parts)] = adapter, [*map(id, _all(parts))]
    kinds = {
        "faceidplusv2": bool(adapter.spec.sizes.get("shortcut")),
        "portraitunnorm": adapter.spec.variant == "faceid-unnorm",
    }
    return parts | {key: True for key, is_so in kinds.items() if is_so}  # what other packs go by


def adapter_of(parts: Tensors, name: str = "IPADAPTER") -> ManagedAdapter:
    """Return the adapter of these tensors, made once for as long as they live.

    Raises CheckpointError for other tensors than an adapter's, which `name` stands for.
    """
    first, ids = _first(parts), [*map(id, _all(parts))]
    known = _managed_by_tensor.get(first) if first is not None else None
    if known is not None and known[1] == ids:
        return known[0]  # type: ignore[no-any-return]
    flat = {
        f"{part}.{key}": tensor
        for part, tensors in parts.items()
        if isinstance(tensors, Mapping)
        for key, tensor in tensors.items()
    }
    published = {**trained_layouts.published(flat, name)}
    module = checkpoint.from_tensors(published, name, operations=comfy.ops.manual_cast)
    made = _managed(name, module)
    if first is not None:
        _managed_by_tensor[first] = made, ids
    return made


def _all(parts: Tensors) -> list[Tensor]:
    return [x for part in parts.values() if isinstance(part, Mapping) for x in part.values()]


def _first(parts: Tensors) -> Tensor | None:
    return next(iter(_all(parts)), None)


def load_image_encoder(path: str | os.PathLike[str]) -> ClipVisionModel:
    """Load the image encoder in a file of open_clip, as `encoder_file.read` finds it.

    Files in transformers' layout go to ComfyUI's own loader. Raises ImageEncoderError, which names
    the file, for one that cannot be read, is not whole, is no image encoder, or lacks a
    configuration.
    """
    path = Path(path)
    try:
        tower, state = read(path)
        return _comfyui_model(path) if tower is None else _loaded(tower, state, path.name)
    except ImageEncoderError as error:
        raise ImageEncoderError(f"Image encoder '{path.name}': {error}.") from error


def _loaded(tower: Tower, state: dict[str, Tensor], name: str) -> ClipVisionModel:
    size = tower.image_size
    convertible = tower.plain and tower.vision.get("layers", 12) <= _CONVERTED_LAYERS
    model = _as_comfyui(tower, state) if convertible else _OpenClipVision(build(tower, state), size)
    model.image_mean = list(tower.preprocess.get("mean", MEAN))
    model.image_std = list(tower.preprocess.get("std", STD))
    resampling = tower.preprocess.get("interpolation", "bicubic")
    if resampling != "bicubic":
        logger.warning(
            "%s asks for %s resampling; ComfyUI's preprocessing is bicubic, so features of "
            "pictures that are not of its size differ a little.",
            name,
            resampling,
        )
    return model


def _comfyui_model(path: Path) -> ClipVisionModel:
    try:
        model = _by_comfyui(path)
    except (RuntimeError, UnboundLocalError) as error:  # it took the file for the nearest size
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise  # memory is short
        raise ImageEncoderError(_UNKNOWN_SIZE) from error
    if model is None:
        raise ImageEncoderError(_UNKNOWN_SIZE)
    return model


def _by_comfyui(path: Path) -> ClipVisionModel | None:
    """Load with ComfyUI's own loader; it goes by the ending: where that is wrong, from tensors."""
    named = path.suffix.lower() in (".safetensors", ".sft")
    if named == (file_format(path) == "safetensors"):
        return comfy.clip_vision.load(str(path))
    return comfy.clip_vision.load_clipvision_from_sd(tensors(path))


def _as_comfyui(tower: Tower, state: dict[str, Tensor]) -> ClipVisionModel:
    """Build a plain vision transformer as ComfyUI's own model."""
    vision = tower.vision
    width = vision.get("width", 768)
    model = host.clip_vision_model(
        {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu" if tower.quick_gelu else "gelu",
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_attention_heads": width // vision.get("head_width", 64),
            "num_hidden_layers": vision.get("layers", 12),
            "num_channels": 3,
            "image_size": tower.image_size,
            "patch_size": vision.get("patch_size", 16),
            "projection_dim": tower.embed_dim,
            "layer_norm_eps": 1e-5,
        }
    )
    prefixed = {VISUAL + key: x for key, x in state.items()}
    converted = comfy.clip_vision.convert_to_transformers(prefixed, VISUAL)
    with fitting():
        missing, unexpected = model.load_sd(converted)
        check_whole(missing, [key for key in unexpected if not key.endswith("position_ids")])
    return model


class _Visual(nn.Module):
    """open_clip's image tower with the interface of ComfyUI's CLIP vision model."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.visual_projection = nn.Module()  # there is one: what comes out is the embedding

    def forward(
        self, pixel_values: Tensor, attention_mask: Any = None, intermediate_output: Any = None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Hidden states before pooling, those before the last block, and embeddings.

        Towers that are no vision transformer of open_clip have no hidden states: `(N, 0, 0)`.
        """
        from open_clip.transformer import VisionTransformer

        pixels = pixel_values.to(next(self.visual.parameters()).dtype)
        if not isinstance(self.visual, VisionTransformer):
            embeds = self.visual(pixels)
            none = embeds.new_zeros(len(embeds), 0, 0)
            return none, none, embeds, None
        out = self.visual.forward_intermediates(
            pixels, indices=[-2, -1], output_fmt="NLC", output_extra_tokens=True
        )
        pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
        penultimate, last = (torch.cat(pair, dim=1) for pair in pairs)
        return last, penultimate, out["image_features"], None


class _OpenClipVision(ClipVisionModel):
    """Run open_clip's own module under ComfyUI's memory management."""

    def __init__(self, visual: nn.Module, image_size: int) -> None:
        self.image_size = image_size
        self.model_type = "clip_vision_model"
        self.config: dict[str, Any] = {}
        self.return_all_hidden_states = False
        self.naf = None
        self.load_device = memory.text_encoder_device()
        offload = memory.text_encoder_offload_device()
        self.dtype = memory.text_encoder_dtype(self.load_device)
        if memory.is_device_cpu(self.load_device):
            self.dtype = torch.float32  # torch's own layers cast nothing
        self.model = _Visual(visual).to(offload, self.dtype).eval().requires_grad_(False)
        self.patcher = host.CoreModelPatcher(
            self.model, load_device=self.load_device, offload_device=offload
        )


def find_files(model: ModelPatcher, preset: str, adapters: Folder, encoders: Folder) -> Choice:
    """Find the best adapter for model and preset that has its encoder beside it.

    Reads headers only. Raises ValueError for a model without UNet cross-attention, and
    FileNotFoundError, which says what to get, where a file is missing.
    """
    if preset not in ADAPTER_PRESETS:
        raise ValueError(f"preset is {preset!r}; expected one of {', '.join(ADAPTER_PRESETS)}.")
    wanted, layers = ADAPTER_PRESETS[preset], layers_of(model)
    inner = model.get_model_object("diffusion_model")
    places = layers_by_place(inner)
    found = finder.adapters(adapters.files)
    seen = [loadable(file) for file in finder.encoders(encoders.files)]
    fitting = [
        file
        for file in _of_kind(found, wanted)
        if fits(file.spec, places[file.spec.place], is_kolors(inner))
    ]
    unusable = [file for file in found if isinstance(file, Unusable)]
    choice = finder.choose(fitting, _usable(seen), wanted, unusable)
    if choice is None:
        folders = replace(adapters, files=tuple(found)), replace(encoders, files=tuple(seen))
        place = next(place for place, some in places.items() if some)
        sizes = layers[0].context_dim, len(layers), is_kolors(inner)
        search = Search(name_of(model), *sizes, wanted, *folders, place)
        raise FileNotFoundError(search.message(fitting))
    logger.info("Preset '%s': %s", preset, "; ".join(choice.chosen()))
    for doubt in choice.doubts:
        logger.warning("Preset '%s': %s.", preset, doubt)
    return choice


def fingerprint_files(preset: str | None, adapters: Folder, encoders: Folder) -> str:
    """Return what changes with the files that `find_files` may take for any model.

    These are the preset's kind of adapter (None: all kinds), the encoders of these, and
    configurations beside them.
    """
    kinds = _of_kind(finder.adapters(adapters.files), ADAPTER_PRESETS.get(preset or ""))
    specs = {file.spec for file in kinds}
    theirs = [
        file
        for file in _usable(finder.encoders(encoders.files))
        if any(map(file.sizes.gives, specs))
    ]
    return finder.digest(finder.stamps(file.path) for file in (*kinds, *theirs))


def describe_choice(choice: Choice) -> str:
    """Return a line for the adapter and one for the encoder, then one for each doubt.

    The lines say what they are and why these.
    """
    return "\n".join([*choice.chosen(), *(f"In doubt: {doubt}." for doubt in choice.doubts)])


def load_encoder(file: EncoderFile) -> ClipVisionModel:
    """Load the encoder as ComfyUI's CLIP_VISION; raises ImageEncoderError."""
    if file.sizes.layout == "open_clip":
        return load_image_encoder(file.path)
    encoder = _by_comfyui(Path(file.path))
    if encoder is None:
        raise ImageEncoderError(f"Image encoder '{file.name}' is of a size ComfyUI does not know.")
    return encoder


def _of_kind(files: Iterable[File], preset: AdapterPreset | None) -> list[AdapterFile]:
    """Return the adapters of the preset's kind; of any where there is no preset."""
    return [
        file
        for file in files
        if isinstance(file, AdapterFile) and (preset is None or preset.asks_for(file.spec))
    ]


def _usable(files: Iterable[File]) -> list[EncoderFile]:
    return [file for file in files if isinstance(file, EncoderFile)]


def loadable(file: EncoderFile | Unusable) -> EncoderFile | Unusable:
    """Return the same file, or why ComfyUI's own loader cannot take it."""
    if isinstance(file, Unusable) or file.sizes.layout == "open_clip":
        return file
    sizes = file.sizes
    found = sizes.hidden_dim, sizes.layers, sizes.mlp_dim, sizes.positions
    known = _known_sizes()
    if found in known and sizes.embed_dim in (0, known[found]):
        return file
    reason = (
        f"'{file.name}' is an image encoder in transformers' layout of a size that ComfyUI does "
        f"not know ({sizes.layers} layers {sizes.hidden_dim} wide, {sizes.positions} positions, "
        f"image embeds {sizes.embed_dim} wide)."
    )
    return Unusable(file.name, file.path, reason)


@functools.cache
def _known_sizes() -> dict[tuple[int, int, int, int], int]:
    """Return each CLIP that ComfyUI's loader knows.

    Width, layers, MLP's width, positions; width of the embedding.
    """
    found = {}
    for path in Path(comfy.clip_vision.__file__).parent.glob("clip_vision_*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        siglip = config.get("model_type") == SIGLIP
        if not (siglip or "projection_dim" in config):  # SigLIP 2
            continue
        positions = (config["image_size"] // config["patch_size"]) ** 2 + (not siglip)
        sizes = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
        found[(*sizes, positions)] = config.get("projection_dim", config["hidden_size"])
    return found
