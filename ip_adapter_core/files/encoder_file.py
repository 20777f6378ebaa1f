"""Files of image encoders: what their headers tell, and open_clip's towers themselves.

Training and ComfyUI's nodes read the same files through this.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..adapter import AdapterSpec
from ..variants import FACE
from .header import (
    DTYPES,
    OLD_FORMAT,
    CheckpointError,
    Shaped,
    damaged,
    file_format,
    read_header,
    read_pickle,
    shapes,
)
from .tower_config import ImageEncoderError, Tower, check_whole, count_blocks, describe

logger = logging.getLogger("comfyui_ip_adapter")
VISUAL = "visual."
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, open_clip's default
STD = (0.26862954, 0.26130258, 0.27577711)
# open_clip's models of shapes that GELU's have too, with the other activation.
_QUICK_GELU = {
    1280: "ViT-H-14-quickgelu (DFN5B, MetaCLIP)",
    1664: "ViT-bigG-14-quickgelu (MetaCLIP)",
}
_NO_OPEN_CLIP = (
    "its tower runs in open_clip itself, which is not installed. Install it into the same Python "
    "with: pip install open_clip_torch"
)
_Shaped = TypeVar("_Shaped", bound=Shaped)


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
        """Return whether the adapter can read its features."""
        if spec.features == FACE:  # it reads none
            return False
        width = self.embed_dim if spec.features == "image_embeds" else self.hidden_dim
        return width == spec.feature_dim


def encoder_sizes(path: str | os.PathLike[str]) -> EncoderSizes:
    """Read the header of an image encoder in transformers' or open_clip's layout.

    Raises:
        ImageEncoderError: The file is none, is not whole, or could not be loaded.
        CheckpointError: It cannot be read.
    """
    path = Path(path)
    metadata: Mapping[str, str] = {}
    kind = file_format(path)
    if kind == "pickle":
        raise ImageEncoderError(OLD_FORMAT)
    if kind == "safetensors":
        layout, metadata = read_header(path)
    else:
        layout = shapes(_tensors_of_pickle(path))
    if _of_transformers(layout):
        return _transformers_sizes(layout)
    return _open_clip_sizes(path, layout, metadata)


def _transformers_sizes(layout: Mapping[str, Shaped]) -> EncoderSizes:
    embeddings, projection = "vision_model.embeddings.", "visual_projection.weight"
    patches = f"{embeddings}patch_embedding.weight"
    siglip = f"{patches[:-6]}bias" in layout
    if not (siglip or f"{embeddings}class_embedding" in layout) or patches not in layout:
        raise ImageEncoderError("it is an image encoder of another kind than CLIP or SigLIP")
    if layout[patches].ndim != 4:
        raise ImageEncoderError("it is an image encoder of another kind than CLIP (SigLIP 2, …)")
    hidden, _, patch, _ = layout[patches].shape
    layers = len({k.split(".")[3] for k in layout if k.startswith("vision_model.encoder.layers.")})
    mlp = _first(layout, "vision_model.encoder.layers.0.mlp.fc1.weight")
    positions = _first(layout, f"{embeddings}position_embedding.weight")
    embed = _first(layout, projection) if projection in layout else 0
    expected = {
        patches: (hidden, 3, patch, patch),
        f"{embeddings}position_embedding.weight": (positions, hidden),
        **({projection: (embed, hidden)} if embed else {}),
        **_norms("vision_model.", ("post_layernorm",), hidden),
    }
    if siglip:
        expected[f"{patches[:-6]}bias"] = (hidden,)
        if "vision_model.head.probe" in layout:
            embed = hidden
            expected |= _pooling_head("vision_model.head.", hidden, mlp)
    else:
        expected[f"{embeddings}class_embedding"] = (hidden,)
        expected |= _norms("vision_model.", ("pre_layrnorm",), hidden)
    for block in (f"vision_model.encoder.layers.{i}." for i in range(layers)):
        expected |= _norms(block, ("layer_norm1", "layer_norm2"), hidden)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expected |= _dense(f"{block}self_attn.{name}", hidden, hidden)
        expected |= _dense(f"{block}mlp.fc1", mlp, hidden) | _dense(f"{block}mlp.fc2", hidden, mlp)
    _check_layout(layout, expected)
    alone = not any(key.startswith("text_model.") for key in layout)
    return EncoderSizes("transformers", embed, hidden, layers, positions, mlp, alone)


def _pooling_head(prefix: str, hidden: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """Return SigLIP's, which makes the embedding of all hidden states."""
    return {
        f"{prefix}probe": (1, 1, hidden),
        f"{prefix}attention.in_proj_weight": (3 * hidden, hidden),
        f"{prefix}attention.in_proj_bias": (3 * hidden,),
        **_dense(f"{prefix}attention.out_proj", hidden, hidden),
        **_norms(prefix, ("layernorm",), hidden),
        **_dense(f"{prefix}mlp.fc1", mlp, hidden),
        **_dense(f"{prefix}mlp.fc2", hidden, mlp),
    }


def _open_clip_sizes(
    path: Path, layout: Mapping[str, Shaped], metadata: Mapping[str, str]
) -> EncoderSizes:
    state = tower_tensors(layout)
    tower = describe(path, state, metadata)
    alone = len(state) == len(layout)
    if not tower.plain and find_spec("open_clip") is None:
        raise ImageEncoderError(_NO_OPEN_CLIP)
    layers, quick = count_blocks(state), tower.quick_gelu
    if not layers or "positional_embedding" not in state:  # a ConvNeXt, a ResNet, timm's
        return EncoderSizes("open_clip", tower.embed_dim, 0, 0, 0, 0, alone, quick)
    hidden, positions = tower.vision.get("width", 768), _first(state, "positional_embedding")
    mlp = int(hidden * tower.vision.get("mlp_ratio", 4.0))
    if tower.plain:
        expected = _plain_layout(tower, hidden, mlp)
        _check_layout(state, expected)
        surplus = [k for k in state if k not in expected and not k.endswith("position_ids")]
        check_whole([], surplus)
    return EncoderSizes("open_clip", tower.embed_dim, hidden, layers, positions, mlp, alone, quick)


def _plain_layout(tower: Tower, hidden: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """Return CLIP's own vision transformer as open_clip names it."""
    patch = tower.vision.get("patch_size", 16)
    layout = {
        "class_embedding": (hidden,),
        "positional_embedding": ((tower.image_size // patch) ** 2 + 1, hidden),
        "conv1.weight": (hidden, 3, patch, patch),
        "proj": (hidden, tower.embed_dim),
        **_norms("", ("ln_pre", "ln_post"), hidden),
    }
    for block in (f"transformer.resblocks.{i}." for i in range(tower.vision.get("layers", 12))):
        layout |= _norms(block, ("ln_1", "ln_2"), hidden)
        layout[f"{block}attn.in_proj_weight"] = (3 * hidden, hidden)
        layout[f"{block}attn.in_proj_bias"] = (3 * hidden,)
        layout |= _dense(f"{block}attn.out_proj", hidden, hidden)
        layout |= _dense(f"{block}mlp.c_fc", mlp, hidden)
        layout |= _dense(f"{block}mlp.c_proj", hidden, mlp)
    return layout


def _dense(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norms(prefix: str, names: Sequence[str], width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name}.{part}": (width,) for name in names for part in ("weight", "bias")}


def _first(layout: Mapping[str, Shaped], key: str) -> int:
    if key not in layout or not layout[key].shape:
        raise ImageEncoderError(f"it lacks the tensor '{key}', or has it in a wrong shape")
    return layout[key].shape[0]


def _check_layout(layout: Mapping[str, Shaped], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ImageEncoderError for what ComfyUI would load with noise in place of a tensor."""
    check_whole([key for key in expected if key not in layout], [])
    for key, shape in expected.items():
        if layout[key].shape != shape:
            raise ImageEncoderError(
                f"its '{key}' has shape {list(layout[key].shape)}, expected {list(shape)}"
            )
        if layout[key].dtype not in DTYPES:
            raise ImageEncoderError(
                f"its '{key}' is stored as {layout[key].dtype}, expected float32, float16 or "
                "bfloat16; use an unquantised file"
            )


def read(path: str | os.PathLike[str]) -> tuple[Tower | None, dict[str, Tensor]]:
    """Return configuration and tensors of the image tower in a file of open_clip.

    The file may hold the whole model or the tower alone; the keys come without prefix. The
    configuration is sought in the file (metadata `open_clip_config` of a .safetensors), then
    beside it (the same name with `.json`, then `open_clip_config.json` if it fits the tensors);
    CLIP ViT-H, g and bigG with GELU need none. Which it is goes to the log. For files whose tensors
    are named as in transformers, None and no tensors.

    Raises:
        ImageEncoderError: There is no usable tower; the message does not name the file.
    """
    path = Path(path)
    try:
        if file_format(path) == "safetensors":
            state, metadata = _safetensors(path)
        else:
            state, metadata = _tensors_of_pickle(path), {}
    except (CheckpointError, OSError) as error:
        raise ImageEncoderError(f"the file cannot be read: {str(error).rstrip('.')}") from error
    if state is None or _of_transformers(state):
        return None, {}
    state = tower_tensors(state)
    tower = describe(path, state, metadata)
    alike = _QUICK_GELU.get(tower.vision.get("width", 0))
    if tower.source:
        logger.info("Image encoder '%s': configuration from %s", path.name, tower.source)
    elif alike:
        logger.warning(
            "Image encoder '%s' brings no configuration and was recognised by its shapes. If it is "
            "%s, whose shapes are the same, its features are wrong: save its open_clip_config.json "
            "beside it with the same name and the ending .json.",
            path.name,
            alike,
        )
    return tower, state


def _of_transformers(names: Iterable[str]) -> bool:
    return any(name.startswith("vision_model.") for name in names)


def _safetensors(path: Path) -> tuple[dict[str, Tensor] | None, Mapping[str, str]]:
    """Return tensors and metadata; no tensors of a file that ComfyUI reads itself."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if _of_transformers(names):
                return None, {}
            wanted = [name for name in names if name.startswith(VISUAL)] or names
            return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error) from error


def tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, whatever its ending says. Raises CheckpointError."""
    if file_format(path) != "safetensors":
        return _tensors_of_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error) from error


def _tensors_of_pickle(path: Path) -> dict[str, Tensor]:
    content = read_pickle(path, mapped=True)
    if not isinstance(content, dict):
        raise ImageEncoderError(f"it holds a {type(content).__name__}; expected tensors by name")
    tensors = {str(key): x for key, x in content.items() if isinstance(x, Tensor)}
    return {key.removeprefix("module."): x for key, x in tensors.items()}


def tower_tensors(state: Mapping[str, _Shaped]) -> dict[str, _Shaped]:
    """Return the image tower's, keys without prefix. Raises ImageEncoderError for none."""
    tower = {k.removeprefix(VISUAL): x for k, x in state.items() if k.startswith(VISUAL)}
    alone = "conv1.weight" in state or any(key.startswith("trunk.") for key in state)
    if not tower and not alone:
        first = ", ".join(sorted(map(str, state))[:3]) or "none"
        raise ImageEncoderError(
            f"none of its {len(state)} tensors belongs to an image tower (the first ones: {first});"
            f" expected names that begin with '{VISUAL}'. Choose a CLIP model of open_clip"
        )
    return tower or {**state}


def build(tower: Tower, state: Mapping[str, Tensor]) -> Any:
    """Return the tower as open_clip's own module, on the CPU.

    Raises:
        ImageEncoderError: open_clip is not installed, or configuration and tensors do not belong
            together.
    """
    try:
        from open_clip.model import _build_vision_tower
    except ImportError as error:
        raise ImageEncoderError(_NO_OPEN_CLIP) from error
    try:
        visual: Any = _build_vision_tower(tower.embed_dim, {**tower.vision}, tower.quick_gelu)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ImageEncoderError(
            f"open_clip builds no image tower from its configuration: {error}"
        ) from error
    with fitting():
        check_whole(*visual.load_state_dict(state, strict=False))
    return visual.eval().requires_grad_(False)


@contextmanager
def fitting() -> Iterator[None]:
    """Turn torch's message of sizes that differ into one of the configuration."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ImageEncoderError(
            f"tensors and configuration do not belong together: {reason}. Give it the "
            "configuration that it was trained with"
        ) from error
