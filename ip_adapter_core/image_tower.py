"""Image towers in open_clip's layout: the configuration and tensors that a file holds.

Training and the host's node read the same files through this.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .headers import Shaped

CONFIG_NAME = "open_clip_config.json"  # beside the weights in open_clip's folders
METADATA_KEY = "open_clip_config"  # inside a .safetensors, the same text
VISUAL = "visual."
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, open_clip's default
STD = (0.26862954, 0.26130258, 0.27577711)
# Towers that their width alone tells: width of a head. The rest share widths with others of
# another activation or number of heads.
_HEADS = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, ViT-g, ViT-bigG
# Settings of a vision transformer as CLIP has it, and their values there. What acts in training
# only is not among them.
_PLAIN: dict[str, Any] = {
    "ls_init_value": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "timm_model_name": None,
}
_Shaped = TypeVar("_Shaped", bound=Shaped)


class ImageEncoderError(ValueError):
    """A file that gives no image encoder, and what to do about it."""


@dataclass(frozen=True)
class Tower:
    """What of an open_clip configuration shapes the image tower and its preprocessing."""

    embed_dim: int
    vision: Mapping[str, Any]
    quick_gelu: bool = False
    preprocess: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image_size(self) -> int:
        """Pixels of the side. Raises ImageEncoderError for sizes that are no square."""
        size = self.preprocess.get("size") or self.vision.get("image_size", 224)
        sides = {size} if isinstance(size, int) else {*size}
        if len(sides) != 1:
            raise ImageEncoderError(
                f"the configuration asks for pictures of {list(size)} pixels; expected a square"
            )
        return int(sides.pop())

    @property
    def plain(self) -> bool:
        """Whether it is a vision transformer just as CLIP's are."""
        usual = all(self.vision.get(name, value) == value for name, value in _PLAIN.items())
        return usual and isinstance(self.vision.get("layers", 12), int)


def read(path: str | os.PathLike[str]) -> tuple[Tower | None, dict[str, Tensor]]:
    """The image tower in a file of open_clip, which may hold the whole model or the tower alone:
    its configuration and its tensors, keys without prefix.

    The configuration is sought in the file (metadata `open_clip_config` of a .safetensors), then
    beside it (the same name with `.json`, then `open_clip_config.json`); CLIP ViT-H, g and bigG
    need none. It is None for files whose tensors are named as in transformers; all are returned.
    Raises ImageEncoderError, without the file's name.
    """
    path = Path(path)
    try:
        state, metadata = _safetensors(path) if is_safetensors(path) else read_pickle(path)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageEncoderError(
            f"the file cannot be read ({reason}). Download it again; pickles that hold more than "
            "tensors must be converted to .safetensors"
        ) from error
    if any(key.startswith("vision_model.") for key in state):
        return None, state
    state = tower_tensors(state)
    return describe(path, state, metadata), state


def is_safetensors(path: Path) -> bool:
    """Whether it goes by that format: encoders do by their ending, in the host's loader too."""
    return path.suffix.lower() in (".safetensors", ".sft")


def describe(path: Path, state: Mapping[str, Shaped], metadata: Mapping[str, str]) -> Tower:
    """The tower of these tensors, keys without prefix: as its configuration says, in the file or
    beside it, else as their shapes do. Raises ImageEncoderError, without the file's name."""
    return _configuration(path, metadata) or _recognised(state)


def configurations(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The files beside an image encoder that may hold its configuration, those that are there."""
    path = Path(path)
    for beside in (path.with_suffix(".json"), path.with_name(CONFIG_NAME)):
        if beside.is_file():
            yield beside


def _safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        wanted = [name for name in names if name.startswith(VISUAL)] or names
        return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}


def read_pickle(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The entries of a file that torch wrote, mapped and not read; no metadata."""
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]  # of a training run
    if not isinstance(found, dict):
        raise ImageEncoderError(f"it holds a {type(found).__name__}; expected tensors by name")
    tensors = {str(key): x for key, x in found.items() if isinstance(x, Tensor)}
    return {key.removeprefix("module."): x for key, x in tensors.items()}, {}


def tower_tensors(state: Mapping[str, _Shaped]) -> dict[str, _Shaped]:
    """The image tower's, keys without prefix. Raises ImageEncoderError where there are none."""
    found = {k.removeprefix(VISUAL): x for k, x in state.items() if k.startswith(VISUAL)}
    alone = "conv1.weight" in state or any(key.startswith("trunk.") for key in state)
    if not found and not alone:
        first = ", ".join(sorted(map(str, state))[:3]) or "none"
        raise ImageEncoderError(
            f"none of its {len(state)} tensors belongs to an image tower (the first ones: {first});"
            f" expected names that begin with '{VISUAL}'. Choose a CLIP model of open_clip"
        )
    return found or {**state}


def _configuration(path: Path, metadata: Mapping[str, str]) -> Tower | None:
    """From the file or beside it; None where there is none."""
    if METADATA_KEY in metadata:
        return _parsed(metadata[METADATA_KEY], f"its metadata {METADATA_KEY}")
    for beside in configurations(path):
        return _parsed(beside.read_text(encoding="utf-8"), f"'{beside.name}' beside it")
    return None


def _parsed(text: str, place: str) -> Tower:
    try:
        config = json.loads(text)
        model = config.get("model_cfg", config)
        return Tower(
            embed_dim=int(model["embed_dim"]),
            vision={**model["vision_cfg"]},
            quick_gelu=bool(model.get("quick_gelu", False)),
            preprocess={**config.get("preprocess_cfg", {})},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageEncoderError(
            f"{place} is no configuration of open_clip ({type(error).__name__}: {error}); expected "
            "embed_dim and vision_cfg, as in open_clip_config.json or open_clip's model_configs"
        ) from error


def _recognised(state: Mapping[str, Shaped]) -> Tower:
    """From the tensors' shapes, where those leave no choice."""
    layers = {re.match(r"transformer\.resblocks\.(\d+)\.", key) for key in state}
    count = len({match[1] for match in layers if match})
    width = state["conv1.weight"].shape[0] if "conv1.weight" in state else 0
    if not count or width not in _HEADS or "proj" not in state:
        raise ImageEncoderError(
            f"it brings no configuration, and its shapes (width {width}, {count} layers) do not "
            "tell heads and activation. Save the model's open_clip_config.json, or the file of its "
            "name in open_clip's model_configs, beside it with the same name and the ending .json"
        )
    patch = state["conv1.weight"].shape[-1]
    grid = round((state["positional_embedding"].shape[0] - 1) ** 0.5)
    hidden = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    vision = {
        "image_size": grid * patch,
        "patch_size": patch,
        "width": width,
        "layers": count,
        "head_width": _HEADS[width],
        "mlp_ratio": hidden / width,
    }
    return Tower(state["proj"].shape[1], vision)


def build(tower: Tower, state: Mapping[str, Tensor]) -> Any:
    """The tower as open_clip's own module, on the CPU. Raises ImageEncoderError where open_clip is
    not installed, or configuration and tensors do not belong together."""
    try:
        from open_clip.model import _build_vision_tower
    except ImportError as error:
        raise ImageEncoderError(
            "a tower of this kind runs in open_clip itself, which is not installed. Install it "
            "into the same Python with: pip install open_clip_torch"
        ) from error
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
    """Turns torch's message of sizes that differ into one of the configuration."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ImageEncoderError(
            f"tensors and configuration do not belong together: {reason}. Give it the "
            "configuration that it was trained with"
        ) from error


def check_whole(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ImageEncoderError if a tensor is missing, or one is left over."""
    for keys, finding in ((missing, "lacks"), (unexpected, "has, beyond its configuration,")):
        if keys:
            raise ImageEncoderError(
                f"it {finding} {len(keys)} tensors of the image tower (the first: {keys[0]}). "
                "Download it again, or give it the configuration that it was trained with"
            )
