"""Image towers in open_clip's layout: what a file holds, and open_clip's own module of it.

Training and the host's node read the same files through this.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from .header import Shaped
from .tower_config import METADATA_KEY, ImageEncoderError, Tower, check_whole, describe

__all__ = ["METADATA_KEY", "ImageEncoderError"]  # which training and tools take from here

logger = logging.getLogger("comfyui_ip_adapter")
VISUAL = "visual."
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, open_clip's default
STD = (0.26862954, 0.26130258, 0.27577711)
# open_clip's models of shapes that GELU's have too, with the other activation.
_QUICK_GELU = {
    1280: "ViT-H-14-quickgelu (DFN5B, MetaCLIP)",
    1664: "ViT-bigG-14-quickgelu (MetaCLIP)",
}
_Shaped = TypeVar("_Shaped", bound=Shaped)


def read(path: str | os.PathLike[str]) -> tuple[Tower | None, dict[str, Tensor]]:
    """The image tower in a file of open_clip, which may hold the whole model or the tower alone:
    its configuration and its tensors, keys without prefix.

    The configuration is sought in the file (metadata `open_clip_config` of a .safetensors), then
    beside it (the same name with `.json`, then `open_clip_config.json` if it fits the tensors);
    CLIP ViT-H, g and bigG with GELU need none. Which it is goes to the log. For files whose tensors
    are named as in transformers, None and no tensors. Raises ImageEncoderError, without the file's
    name.
    """
    path = Path(path)
    try:
        state, metadata = _safetensors(path) if is_safetensors(path) else read_pickle(path)
    except (ImageEncoderError, MemoryError):
        raise
    except Exception as error:  # torch raises a dozen kinds for damaged archives
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageEncoderError(
            f"the file cannot be read ({reason}). Download it again; pickles that hold more than "
            "tensors must be converted to .safetensors"
        ) from error
    if state is None or _of_transformers(state):
        return None, {}
    state = tower_tensors(state)
    tower = describe(path, state, metadata)
    _log_source(path.name, tower)
    return tower, state


def _log_source(name: str, tower: Tower) -> None:
    alike = _QUICK_GELU.get(tower.vision.get("width", 0))
    if tower.source:
        logger.info("Image encoder '%s': configuration from %s", name, tower.source)
    elif alike:
        logger.warning(
            "Image encoder '%s' brings no configuration and was recognised by its shapes. If it is "
            "%s, whose shapes are the same, its features are wrong: save its open_clip_config.json "
            "beside it with the same name and the ending .json.",
            name,
            alike,
        )


def _of_transformers(names: Iterable[str]) -> bool:
    return any(name.startswith("vision_model.") for name in names)


def is_safetensors(path: Path) -> bool:
    """Whether it goes by that format: encoders do by their ending, in the host's loader too."""
    return path.suffix.lower() in (".safetensors", ".sft")


def _safetensors(path: Path) -> tuple[dict[str, Tensor] | None, Mapping[str, str]]:
    """Tensors and metadata; none of a file for the host's loader, which reads it itself."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if _of_transformers(names):
            return None, {}
        wanted = [name for name in names if name.startswith(VISUAL)] or names
        return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}


def read_pickle(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The entries of a file that torch wrote, mapped and not read where its format allows that
    (since torch 1.6); no metadata."""
    with open(path, "rb") as file:
        mapped = file.read(2) == b"PK"
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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
