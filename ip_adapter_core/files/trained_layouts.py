"""Adapters as trainers and XLabs name their tensors, renamed to the published layout.

The reference scripts save their whole module with accelerate: `image_proj_model.*`,
`adapter_modules.N.*` and the UNet, in a .safetensors without the names that share memory. diffusers
saves a UNet with the adapter inside. Names and their order: diffusers' loaders/unet.py,
tencent-ailab/IP-Adapter's tutorial_train.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .header import CheckpointError, Shape

_OF_TRAINERS = re.compile(
    r"(^|\.)(image_proj_model|adapter_modules|encoder_hid_proj\.image_projection_layers)\."
    r"|\.processor\.to_[kv]_ip\."
)
_MODULE = re.compile(  # W'k and W'v, and FaceID's LoRA
    r"adapter_modules\.(\d+)\.(to_[kv]_ip|to_(?:q|k|v|out)_lora\.(?:down|up))\.weight"
)
_IN_UNET = re.compile(
    r"(down_blocks|up_blocks|mid_block)\.(.+)\.attn2\.processor\.(to_[kv]_ip)(?:\.(\d+))?\.weight"
)
_XLABS_LAYER = re.compile(
    r"double_blocks\.(\d{1,4})\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)"
)
_SIDES = ("down_blocks", "up_blocks", "mid_block")  # the order of diffusers' attn_processors
_HIDDEN_PROJECTION = "encoder_hid_proj.image_projection_layers."
_RENAMED = (  # diffusers' names of a projection, and the published ones
    (r"image_embeds\.", "proj."),
    (r"ff\.net\.0\.proj\.", "proj.0."),
    (r"ff\.net\.2\.", "proj.2."),
    (r"layers\.(\d+)\.ln0\.", r"layers.\1.0.norm1."),
    (r"layers\.(\d+)\.ln1\.", r"layers.\1.0.norm2."),
    (r"layers\.(\d+)\.attn\.to_out\.0\.", r"layers.\1.0.to_out."),
    (r"layers\.(\d+)\.attn\.", r"layers.\1.0."),
    (r"layers\.(\d+)\.ff\.0\.", r"layers.\1.1.0."),
    (r"layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"layers\.(\d+)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)


def of_adapter(names: Iterable[str]) -> list[str]:
    """Return those of an adapter in a trainer's layout: none in any other."""
    names = list(names)
    if any(name.startswith("image_proj.") for name in names):
        return []
    return [name for name in names if _OF_TRAINERS.search(name)]


def published(weights: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the adapter in `weights` under the published names; others come back as they are.

    Args:
        weights: Tensors, or their shapes.
        name: The file's, for messages.

    Raises:
        CheckpointError: A part of the adapter is in the file, and another is not.
    """
    if not of_adapter(weights):
        return {_of_xlabs(key): x for key, x in weights.items()}
    bare = {re.sub(r"^(module\.)?(unet\.)?", "", key): x for key, x in weights.items()}
    projection = dict(_projection(bare, name))
    layers = dict(_layers(bare, name))
    if not layers:
        raise CheckpointError(
            f"'{name}' holds an adapter's projection, but no W'k and W'v of a UNet's layers "
            "('…to_k_ip.weight'): its trainer saved them elsewhere, in 'adapter_modules' of the "
            "checkpoint's pytorch_model.bin or model.safetensors. Choose that file."
        )
    if not projection:
        raise CheckpointError(
            f"'{name}' holds W'k and W'v of {len(layers) // 2} layers, but no projection of image "
            "features ('image_proj_model.…' or 'encoder_hid_proj.…'): a UNet was saved, and the "
            "projection beside it was not. Choose the checkpoint's pytorch_model.bin or "
            "model.safetensors, which holds both."
        )
    return {**projection, **layers}


def _of_xlabs(key: str) -> str:
    """Return the name that diffusers gives to a tensor of XLabs' Flux adapters; others' as is."""
    match = _XLABS_LAYER.fullmatch(key)
    if match is not None:
        return f"ip_adapter.{match[1]}.to_{match[2]}_ip.{match[3]}"
    return re.sub(r"^ip_adapter_proj_model\.", "image_proj.", key)


def _projection(bare: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    own = "image_proj_model."
    for key, x in bare.items():
        if key.startswith(own):
            yield f"image_proj.{key.removeprefix(own)}", x
    several = {key.split(".")[2] for key in bare if key.startswith(_HIDDEN_PROJECTION)}
    _check_one(several, name)
    theirs = {
        _renamed(key.removeprefix(_HIDDEN_PROJECTION).partition(".")[2]): x
        for key, x in bare.items()
        if key.startswith(_HIDDEN_PROJECTION)
    }
    last = theirs.get("proj.2.weight")
    full = last is not None and theirs["norm.weight"].shape[0] == last.shape[0]
    for key, x in theirs.items():
        if key.endswith(".to_k.weight"):
            both = [x, theirs[key.replace(".to_k.", ".to_v.")]]
            yield f"image_proj.{key.replace('.to_k.', '.to_kv.')}", _stacked(both)
        elif not key.endswith(".to_v.weight"):
            yield f"image_proj.{re.sub('^norm', 'proj.3', key) if full else key}", x


def _renamed(key: str) -> str:
    for theirs, ours in _RENAMED:
        key, found = re.subn(f"^{theirs}", ours, key)
        if found:
            break
    return key


def _layers(bare: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    found = [(m[1], m[2], x) for key, x in bare.items() if (m := _MODULE.fullmatch(key))]
    if not found:
        inside = [(m, x) for key, x in bare.items() if (m := _IN_UNET.fullmatch(key))]
        _check_one({m[4] for m, _ in inside}, name)
        places = {(_SIDES.index(m[1]), *map(int, re.findall(r"\d+", m[2]))) for m, _ in inside}
        numbers = {place: 2 * i + 1 for i, place in enumerate(sorted(places))}
        for m, x in inside:
            place = (_SIDES.index(m[1]), *map(int, re.findall(r"\d+", m[2])))
            found.append((str(numbers[place]), m[3], x))
    for number, kind, x in found:
        yield f"ip_adapter.{number}.{kind}.weight", x


def _check_one(adapters: set[str | None] | set[str], name: str) -> None:
    if len(adapters) > 1:
        raise CheckpointError(
            f"'{name}' holds {len(adapters)} adapters inside one UNet; expected one. Save "
            "each from a UNet that has it alone."
        )


def _stacked(tensors: list[Any]) -> Any:
    if all(isinstance(x, Tensor) for x in tensors):
        return torch.cat(tensors)
    rows = sum(x.shape[0] for x in tensors)
    return Shape((rows, *tensors[0].shape[1:]), tensors[0].dtype)
