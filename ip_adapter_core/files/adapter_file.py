"""Files of IP-Adapters: reading, recognizing by shape, and writing."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from ..adapter import KEYS_VALUES, PROJECTIONS, AdapterSpec, IPAdapter
from ..face_projection import WIDTH as FACE_WIDTH
from ..resampler import DIM_HEAD
from ..variants import CROSS_ATTENTION, Place, Variant
from . import trained_layouts
from .atomic import atomic
from .header import DTYPES, Shape, Shaped, damaged, few, file_format, read_pickle
from .header import CheckpointError as CheckpointError  # what `load` raises
from .other_kinds import TAKE, other_kind

logger = logging.getLogger("comfyui_ip_adapter")
# The tensor whose presence decides for a projection.
SIGNATURES: dict[Variant, str] = {
    "base": "proj.weight",
    "plus": "latents",
    "full": "proj.3.weight",
    "faceid-plus": "perceiver_resampler.proj_in.weight",
    "faceid": "proj.2.weight",
    "instantx": "proj.2.weight",  # the same class, where the layers are a transformer's
}
LORA = re.compile(r"ip_adapter\.(\d{1,4})\.to_(q|k|v|out)_lora\.(down|up)\.weight")
"""A LoRA that a FaceID file carries for every attention layer, self-attention included."""
EXTENSIONS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")
_KOLORS_FACE = 4096  # width of Kolors FaceID's tokens
_PLUS_V1 = re.compile(r"faceid[-_ .]?plus(?![-_ .]?v2)", re.IGNORECASE)
_LAYER = re.compile(r"ip_adapter\.(\d{1,4})\.to_([kv])_ip\.weight")
_BIAS = re.compile(r"ip_adapter\.\d{1,4}\.to_[kv]_ip\.bias")
_PROJECTS: dict[Place, Variant] = {"block output": "base", "attention output": "instantx"}


def load(path: str | os.PathLike[str], *, operations: Any = nn) -> IPAdapter:
    """Read an IP-Adapter of a kind in `PROJECTIONS`.

    `.safetensors`, or `.bin`/`.pt` as torch writes them (tensors only: code in a pickle is
    never run). Tensors keep the file's dtype.

    Raises:
        CheckpointError: The file holds no complete and finite adapter of a supported kind.
    """
    return from_tensors(read(path), os.path.basename(path), operations=operations)


def from_tensors(weights: Mapping[str, Tensor], name: str, *, operations: Any = nn) -> IPAdapter:
    """Make an adapter of these tensors, which become its own. Raises CheckpointError as `load`."""
    spec = recognize(weights, name)
    if spec.variant == "faceid-plus":
        version = "v2" if spec.sizes["shortcut"] else "v1"
        logger.info("'%s' is taken for FaceID Plus %s.", name, version)
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"'{name}': '{key}' contains NaN or infinite values. The file is damaged, or "
                "its training diverged."
            )
    adapter = IPAdapter(spec, operations=operations, device="meta")
    own = {key: tensor for key, tensor in weights.items() if not LORA.fullmatch(key)}
    adapter.load_state_dict(own, assign=True)
    adapter.lora = {key: tensor for key, tensor in weights.items() if LORA.fullmatch(key)}
    return adapter


def save(
    weights: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: dict[str, str],
) -> None:
    """Write an adapter, or its `state_dict`, in the official layout as fp16 safetensors."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    half = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in state.items()}
    with atomic(path) as temporary:
        temporary.write_bytes(serialize(half, metadata))


def read(path: str | os.PathLike[str], *, mapped: bool = False) -> dict[str, Tensor]:
    """Return all tensors of a file under dotted keys, of torch's files perhaps `mapped` ones.

    Raises:
        CheckpointError: The file holds other things.
    """
    name = os.path.basename(path)
    if file_format(path) != "safetensors":
        weights = dict(_flatten(read_pickle(path, mapped=mapped), name))
    else:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())  # a trainer's may have gigabytes of UNet besides
                wanted = trained_layouts.of_adapter(names) or names
                weights = {key: file.get_tensor(key) for key in wanted}
        except (SafetensorError, ValueError, OSError) as error:
            raise damaged(path, error) from error
    return {**trained_layouts.published(weights, name)}


def _flatten(
    content: Any, name: str, prefix: str = "", depth: int = 2
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        if not _is_plain(content):
            raise CheckpointError(
                f"'{name}' holds a sparse, nested, expanded or dataless tensor at '{prefix}', "
                "where a plain one was expected. It was saved by something else."
            )
        yield prefix, content
    elif isinstance(content, Mapping) and depth:
        for key, value in content.items():
            yield from _flatten(value, name, f"{prefix}.{key}" if prefix else str(key), depth - 1)
    else:
        raise CheckpointError(
            f"'{name}' holds {type(content).__name__} at '{prefix or 'top level'}', where a "
            "tensor was expected. It is no IP-Adapter, or was saved by something else."
        )


def _is_plain(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()  # no billion views of one number


def trained_with(metadata: Mapping[str, str]) -> str | None:
    """Return the image encoder's name that this repository's training notes in the metadata."""
    try:
        noted = json.loads(metadata["ip_adapter"])
        return str(noted.get("image_encoder_path") or noted["image_encoder"])  # the latter: 0.1
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def recognize(weights: Mapping[str, Shaped], name: str) -> AdapterSpec:
    """Return the adapter that all tensors of these names, shapes and precisions make together.

    Raises:
        CheckpointError: They make none, or one of an unsupported kind.
    """
    other = other_kind(weights)
    kind = other.name if other else unsupported_kind(weights)
    if kind is not None:
        raise CheckpointError(
            f"'{name}' is {kind}, which is no IP-Adapter of this pack's. Supported are the base, "
            "fine-grained (plus) and full IP-Adapters for SD1.5 and SDXL, those of FaceID, Kolors' "
            f"Plus, and XLabs' and InstantX's for Flux.1. {other.remedy if other else TAKE}"
        )
    spec = infer_spec(weights, name)
    lora = {key: x for key, x in weights.items() if LORA.fullmatch(key)}
    if lora and spec.variant not in ("faceid", "faceid-plus"):
        raise CheckpointError(
            f"'{name}' is a {spec.variant} adapter with a LoRA of FaceID ({few(lora)}); expected "
            "one or the other. Download it again."
        )
    own = {key: x for key, x in weights.items() if key not in lora}
    _check(own, _layout(spec), name)
    if lora:
        _check(lora, _lora_layout(spec, lora), name)
    return spec


def unsupported_kind(weights: Mapping[str, Shaped]) -> str | None:
    """Return the name of the relative that needs more than an image encoder, or None."""

    def width(key: str, axis: int) -> int | None:
        tensor = weights.get(key)
        return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else None

    if any(".norm_ip." in key or key.startswith("image_proj.time_") for key in weights):
        return "an SD3 IP-Adapter"
    if width("ip_adapter.0.to_k_ip.weight", 0) in (1536, 2432):
        return "an SD3 IP-Adapter"
    if width("image_proj.perceiver_resampler.proj_in.weight", 0) == _KOLORS_FACE:
        return "a FaceID Plus IP-Adapter of Kolors (its tokens pass through the model's own layer)"
    if width("image_proj.proj_in.weight", 1) == FACE_WIDTH and not _is_unnorm(weights):
        return (
            "an InstantID adapter (it has the shapes of FaceID Portrait Unnorm, which is stored in "
            "two precisions, and reads the faces of another encoder)"
        )
    return None


def _is_unnorm(weights: Mapping[str, Shaped]) -> bool:
    """Tell Portrait Unnorm from InstantID, whose shapes are the same: by its two precisions."""
    dtypes = {
        part: {x.dtype for key, x in weights.items() if key.startswith(part)}
        for part in ("image_proj.", "ip_adapter.")
    }
    return dtypes["image_proj."] != dtypes["ip_adapter."]


def infer_spec(weights: Mapping[str, Shaped], name: str) -> AdapterSpec:
    """Recognize the adapter from names and shapes of its tensors, never from the file's name."""
    projection = {
        key.removeprefix("image_proj."): value
        for key, value in weights.items()
        if key.startswith("image_proj.")
    }
    layers = sorted({int(m[1]) for m in map(_LAYER.fullmatch, weights) if m})
    if not projection or not layers:
        lacking = "'image_proj.…'" if not projection else "'ip_adapter.N.to_k_ip.weight'"
        raise CheckpointError(
            f"'{name}' is no IP-Adapter: it has no {lacking} tensors. Found {len(weights)} "
            f"tensors: {few(weights)}."
        )
    variant = next((known for known, key in SIGNATURES.items() if key in projection), None)
    if variant is None:
        raise CheckpointError(
            f"'{name}' has a projection of an unknown kind: expected one of "
            f"{', '.join(f'image_proj.{key}' for key in dict.fromkeys(SIGNATURES.values()))}; "
            f"found {few('image_proj.' + key for key in projection)}."
        )
    place = _place(weights, layers)
    expected = range(layers[-1] + 1) if place != CROSS_ATTENTION else range(1, layers[-1] + 1, 2)
    if layers != [*expected]:
        missing = sorted(set(expected) - set(layers))
        kind = "1, 3, 5 … " if place == CROSS_ATTENTION else "0, 1, 2 … (Flux.1) "
        raise CheckpointError(
            f"'{name}' numbers its layers {few(layers)}; expected {kind}"
            + (f"without gaps, but {few(missing)} is missing." if missing else "(odd).")
        )
    if place == "attention output" and variant == "faceid":
        variant = "instantx"
    if place != CROSS_ATTENTION and variant != _PROJECTS[place]:
        raise CheckpointError(
            f"'{name}' numbers its layers as adapters of transformers (Flux.1) do, but has the "
            f"projection of a {variant} adapter; expected that of XLabs' or InstantX's adapters. "
            "It is another kind of model."
        )
    try:
        if variant == "plus" and projection["proj_in.weight"].shape[1] == FACE_WIDTH:
            variant = "faceid-unnorm"
        sizes = PROJECTIONS[variant].sizes(projection)
        if variant == "faceid-plus":  # only for SD1.5 there is a v1, of the same shapes
            small = sizes["cross_attention_dim"] == 768
            sizes["shortcut"] = int(not (small and _PLUS_V1.search(name)))
        widths = tuple(weights[f"ip_adapter.{n}.to_k_ip.weight"].shape[0] for n in layers)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"'{name}' is an incomplete {variant} adapter: a tensor that tells its sizes is "
            f"missing or has a wrong shape ({error}). Download it again."
        ) from error
    if 0 in {key: x for key, x in sizes.items() if key != "shortcut"}.values():
        raise CheckpointError(
            f"'{name}' has a {variant} projection of impossible shapes: {sizes}"
            + (f" (attention heads are {DIM_HEAD} wide)." if "heads" in sizes else ".")
        )
    return AdapterSpec(variant, tuple(sizes.items()), widths, place)


def _place(weights: Mapping[str, Shaped], layers: list[int]) -> Place:
    """Return where an adapter of layers of these numbers acts, as these and biases tell."""
    if 0 not in layers:
        return CROSS_ATTENTION
    biased = any(_BIAS.fullmatch(key) for key in weights)
    return "block output" if biased else "attention output"


@functools.lru_cache(maxsize=32)  # a folder holds many files of few kinds
def _layout(spec: AdapterSpec) -> dict[str, Shape]:
    """Return the tensors of `IPAdapter(spec)`.

    Its many layers are not built, which would take the search of a folder twice the time.
    """
    projection = PROJECTIONS[spec.variant](**spec.sizes, device="meta").state_dict()
    layout = {f"image_proj.{key}": Shape(tuple(x.shape), x.dtype) for key, x in projection.items()}
    for number, width in zip(spec.numbers, spec.layer_dims, strict=True):
        for kind in "kv":
            layer = f"ip_adapter.{number}.to_{kind}_ip"
            shape = Shape((width, spec.cross_attention_dim), torch.float32)
            layout[f"{layer}.weight"] = shape
            if KEYS_VALUES[spec.place].bias:
                layout[f"{layer}.bias"] = Shape((width,), torch.float32)
    return layout


def _lora_layout(spec: AdapterSpec, lora: Mapping[str, Shaped]) -> dict[str, Shape]:
    """Return the tensors of a whole LoRA of that rank: four for each attention layer."""
    rank = max(x.shape[0] for key, x in lora.items() if ".down." in key or len(lora) == 1)
    layout = {}
    for i, width in enumerate(spec.layer_dims):
        for number, context in ((2 * i, width), (2 * i + 1, spec.cross_attention_dim)):
            for part, into in (("q", width), ("k", context), ("v", context), ("out", width)):
                name = f"ip_adapter.{number}.to_{part}_lora"
                layout[f"{name}.down.weight"] = Shape((rank, into), torch.float32)
                layout[f"{name}.up.weight"] = Shape((width, rank), torch.float32)
    return layout


def _check(weights: Mapping[str, Shaped], layout: Mapping[str, Shaped], name: str) -> None:
    missing = [key for key in layout if key not in weights]
    if missing:
        raise CheckpointError(
            f"'{name}' is incomplete: {len(missing)} of {len(layout)} tensors are missing: "
            f"{few(missing)}. Download it again."
        )
    surplus = [key for key in weights if key not in layout]
    if surplus:
        raise CheckpointError(
            f"'{name}' holds {len(surplus)} tensors that no supported IP-Adapter has: "
            f"{few(surplus)}. It is another kind of model."
        )
    for key, expected in layout.items():
        tensor = weights[key]
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"'{name}': '{key}' has shape {list(tensor.shape)}, expected "
                f"{list(expected.shape)} from the shapes of the other tensors. Download it again."
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"'{name}': '{key}' is stored as {tensor.dtype}, expected float32, float16 or "
                "bfloat16. Use an unquantised file."
            )
