"""What an image encoder's file gives, told by its header: layout, widths, whether it is whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..adapter import AdapterSpec
from . import encoder_file as image_tower
from . import tower_config
from .adapter_file import DTYPES, OLD_FORMAT, file_format
from .header import HeaderError, Shaped, read_safetensors, shapes

Layout = dict[str, tuple[int, ...]]
_PATCHES = "vision_model.embeddings.patch_embedding.weight"
_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_CLASS = "vision_model.embeddings.class_embedding"


@dataclass(frozen=True)
class EncoderSizes:
    """Widths of what an encoder gives, 0 for what it does not give.

    `positions` counts patches and the class token; it, `layers` and `mlp_dim` are 0 for what is
    no vision transformer. `alone`: whether the file holds no text tower besides. `quick_gelu`:
    whether its configuration asks for that activation; no shape tells.
    """

    layout: Literal["transformers", "open_clip"]
    embed_dim: int
    hidden_dim: int
    layers: int
    positions: int
    mlp_dim: int
    alone: bool
    quick_gelu: bool = False

    def gives(self, spec: AdapterSpec) -> bool:
        """Whether the adapter can read its features."""
        width = self.embed_dim if spec.features == "image_embeds" else self.hidden_dim
        return width == spec.feature_dim


def encoder_sizes(path: Path) -> EncoderSizes:
    """Read the header of an image encoder in transformers' or open_clip's layout.

    Raises HeaderError, ImageEncoderError or CheckpointError for a file that is none, is not whole,
    or could not be loaded; what else torch may raise for a damaged pickle passes through.
    """
    metadata: Mapping[str, str] = {}
    found_format = file_format(path)
    if found_format == "pickle":
        raise HeaderError(OLD_FORMAT)
    if image_tower.is_safetensors(path) != (found_format == "safetensors"):
        raise HeaderError("its ending belongs to another format; give it the right one")
    if found_format == "safetensors":
        found, metadata = read_safetensors(path)
    else:
        tensors, metadata = image_tower.read_pickle(path)
        found = shapes(tensors)
    if any(key.startswith("vision_model.") for key in found):
        return _transformers(found)
    return _open_clip(path, found, metadata)


def _transformers(found: Mapping[str, Shaped]) -> EncoderSizes:
    if _CLASS not in found or _PATCHES not in found:
        raise HeaderError("it is an image encoder of another kind than CLIP (SigLIP, …)")
    hidden, _, patch, _ = found[_PATCHES].shape
    layers = _count(r"vision_model\.encoder\.layers\.(\d{1,3})\.", found)
    mlp = _first(found, "vision_model.encoder.layers.0.mlp.fc1.weight")
    positions = _first(found, _POSITIONS)
    projection = "visual_projection.weight"
    embed = _first(found, projection) if projection in found else 0
    layout: Layout = {
        _CLASS: (hidden,),
        _PATCHES: (hidden, 3, patch, patch),
        _POSITIONS: (positions, hidden),
        **_norms("vision_model.pre_layrnorm", hidden),
        **_norms("vision_model.post_layernorm", hidden),
        **({projection: (embed, hidden)} if embed else {}),
    }
    for layer in (f"vision_model.encoder.layers.{i}" for i in range(layers)):
        layout |= _norms(f"{layer}.layer_norm1", hidden) | _norms(f"{layer}.layer_norm2", hidden)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layout |= _dense(f"{layer}.self_attn.{name}", hidden, hidden)
        layout |= _dense(f"{layer}.mlp.fc1", mlp, hidden)
        layout |= _dense(f"{layer}.mlp.fc2", hidden, mlp)
    _check(found, layout)
    alone = not any(key.startswith("text_model.") for key in found)
    return EncoderSizes("transformers", embed, hidden, layers, positions, mlp, alone)


def _open_clip(
    path: Path, found: Mapping[str, Shaped], metadata: Mapping[str, str]
) -> EncoderSizes:
    state = image_tower.tower_tensors(found)
    tower = tower_config.describe(path, state, metadata)
    alone = len(state) == len(found)
    if not tower.plain and find_spec("open_clip") is None:
        raise HeaderError(
            "its tower runs in open_clip itself, which is not installed; install it into the same "
            "Python with: pip install open_clip_torch"
        )
    layers = _count(r"transformer\.resblocks\.(\d{1,3})\.", state)
    quick = tower.quick_gelu
    if not layers or "positional_embedding" not in state:  # a ConvNeXt, a ResNet, timm's
        return EncoderSizes("open_clip", tower.embed_dim, 0, 0, 0, 0, alone, quick)
    hidden, positions = tower.vision.get("width", 768), _first(state, "positional_embedding")
    mlp = int(hidden * tower.vision.get("mlp_ratio", 4.0))
    if tower.plain:
        layout = _plain(tower, hidden, mlp)
        _check(state, layout)
        surplus = [key for key in state if key not in layout and not key.endswith("position_ids")]
        tower_config.check_whole([], surplus)
    return EncoderSizes("open_clip", tower.embed_dim, hidden, layers, positions, mlp, alone, quick)


def _plain(tower: tower_config.Tower, hidden: int, mlp: int) -> Layout:
    """CLIP's own vision transformer as open_clip names it, of the sizes in the configuration."""
    patch = tower.vision.get("patch_size", 16)
    layout: Layout = {
        "class_embedding": (hidden,),
        "positional_embedding": ((tower.image_size // patch) ** 2 + 1, hidden),
        "conv1.weight": (hidden, 3, patch, patch),
        "proj": (hidden, tower.embed_dim),
        **_norms("ln_pre", hidden),
        **_norms("ln_post", hidden),
    }
    for block in (f"transformer.resblocks.{i}" for i in range(tower.vision.get("layers", 12))):
        layout |= _norms(f"{block}.ln_1", hidden) | _norms(f"{block}.ln_2", hidden)
        layout[f"{block}.attn.in_proj_weight"] = (3 * hidden, hidden)
        layout[f"{block}.attn.in_proj_bias"] = (3 * hidden,)
        layout |= _dense(f"{block}.attn.out_proj", hidden, hidden)
        layout |= _dense(f"{block}.mlp.c_fc", mlp, hidden)
        layout |= _dense(f"{block}.mlp.c_proj", hidden, mlp)
    return layout


def _dense(name: str, out: int, into: int) -> Layout:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norms(name: str, width: int) -> Layout:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _count(pattern: str, found: Mapping[str, Shaped]) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, found) if match})


def _first(found: Mapping[str, Shaped], key: str) -> int:
    if key not in found or not found[key].shape:
        raise HeaderError(f"it lacks the tensor '{key}', or has it in a wrong shape")
    return found[key].shape[0]


def _check(found: Mapping[str, Shaped], expected: Layout) -> None:
    """The host loads a tower with tensors missing, and leaves noise in their place."""
    missing = [key for key in expected if key not in found]
    tower_config.check_whole(missing, [])
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise HeaderError(
                f"its '{key}' has shape {list(found[key].shape)}, expected {list(shape)}"
            )
        if found[key].dtype not in DTYPES:
            raise HeaderError(
                f"its '{key}' is stored as {found[key].dtype}, expected float32, float16 or "
                "bfloat16; use an unquantised file"
            )
