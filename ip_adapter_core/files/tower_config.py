"""open_clip's configuration of an image tower: in the file, beside it, or told by the shapes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .header import Shaped

CONFIG_NAME = "open_clip_config.json"  # beside the weights in open_clip's folders
METADATA_KEY = "open_clip_config"  # inside a .safetensors, the same text
# Towers whose width tells that of a head: ViT-H, ViT-g, ViT-bigG. The rest share widths with others
# of another number of heads. No shape tells the activation: it is taken for GELU.
_HEADS = {1280: 80, 1408: 88, 1664: 104}
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


class ImageEncoderError(ValueError):
    """A file that gives no image encoder, and what to do about it."""


@dataclass(frozen=True)
class Tower:
    """What of an open_clip configuration shapes the image tower and its preprocessing.

    `source`: where the configuration was found; empty for a tower recognised by its shapes.
    """

    embed_dim: int
    vision: Mapping[str, Any]
    quick_gelu: bool = False
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def image_size(self) -> int:
        """Pixels of the side. Raises ImageEncoderError for sizes that are no square."""
        size = self.preprocess.get("size") or self.vision.get("image_size", 224)
        sides = {size} if isinstance(size, int) else {*size}
        if len(sides) != 1:
            raise ImageEncoderError(
                f"the configuration asks for images of {list(size)} pixels; expected a square"
            )
        return int(sides.pop())

    @property
    def plain(self) -> bool:
        """Whether it is a vision transformer just as CLIP's are."""
        usual = all(self.vision.get(name, value) == value for name, value in _PLAIN.items())
        return usual and isinstance(self.vision.get("layers", 12), int)


def describe(path: Path, state: Mapping[str, Shaped], metadata: Mapping[str, str]) -> Tower:
    """Return the tower of these tensors, keys without prefix.

    As its configuration says, in the file or beside it, else as the tensors' shapes do.

    Raises:
        ImageEncoderError: Nothing tells; the message does not name the file.
    """
    if METADATA_KEY in metadata:
        place = f"its metadata {METADATA_KEY}"
        return _tower(_json(metadata[METADATA_KEY], place), place)
    passed_over = ""
    for beside in configurations(path):
        if beside.name == CONFIG_NAME:  # of the whole folder, which may hold other models
            tower, passed_over = _of_folder(beside, state)
        else:
            tower = _beside(beside)
        if tower is not None:
            return tower
    return _recognised(state, passed_over)


def configurations(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the files beside an image encoder that may hold its configuration."""
    path = Path(path)
    for beside in (path.with_suffix(".json"), path.with_name(CONFIG_NAME)):
        if beside.is_file():
            yield beside


def _of_folder(path: Path, state: Mapping[str, Shaped]) -> tuple[Tower | None, str]:
    """Return the configuration for all files of a folder if it is of this tower, else why not."""
    try:
        tower = _beside(path)
    except ImageEncoderError as error:
        return None, f" ({error})"
    if tower is None or _fits(tower, state):
        return tower, ""
    return None, f" ('{path.name}' beside it is of another tower)"


def _beside(path: Path) -> Tower | None:
    """Read a .json; None where that is of something else, such as a model manager's notes."""
    place = f"'{path.name}' beside it"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ImageEncoderError(f"{place} cannot be read ({error.strerror})") from error
    config = _json(text, place)
    if not isinstance(config, dict) or not {"model_cfg", "vision_cfg"} & config.keys():
        return None
    return _tower(config, place)


def _json(text: str | bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_configuration(place, error) from error


def _tower(config: Any, place: str) -> Tower:
    try:
        model = config.get("model_cfg", config)
        preprocess = config.get("preprocess_cfg") or {}
        tower = Tower(
            embed_dim=int(model["embed_dim"]),
            vision={**model["vision_cfg"]},
            quick_gelu=bool(model.get("quick_gelu", False)),
            preprocess={key: value for key, value in preprocess.items() if value is not None},
            source=place,
        )
        _check_numbers(tower)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_configuration(place, error) from error
    return tower


def _no_configuration(place: str, error: Exception) -> ImageEncoderError:
    return ImageEncoderError(
        f"{place} is no configuration of open_clip ({type(error).__name__}: {error}); expected "
        "embed_dim and vision_cfg, as in open_clip_config.json or open_clip's model_configs"
    )


def _check_numbers(tower: Tower) -> None:
    """Raise ValueError for sizes and colors that are no numbers: text, or nothing."""
    sizes = ("width", "layers", "patch_size", "image_size", "head_width")
    found = {name: tower.vision[name] for name in sizes if name in tower.vision}
    if isinstance(found.get("layers"), list):  # a ResNet, which has no patches
        found.pop("patch_size", None)
    if "size" in tower.preprocess:
        found["size"] = tower.preprocess["size"]
    for name, value in found.items():
        parts = value if isinstance(value, list | tuple) and value else [value]
        if not all(isinstance(part, int) and part > 0 for part in parts):
            raise ValueError(f"'{name}' is {value!r}, expected a whole number above 0")
    ratio = tower.vision.get("mlp_ratio", 4.0)
    if not isinstance(ratio, int | float) or ratio <= 0:
        raise ValueError(f"'mlp_ratio' is {ratio!r}, expected a number above 0")
    for name in {"mean", "std"} & tower.preprocess.keys():
        value = tower.preprocess[name]
        if len(value) != 3 or not all(isinstance(part, int | float) for part in value):
            raise ValueError(f"'{name}' is {value!r}, expected three numbers")


def _fits(tower: Tower, state: Mapping[str, Shaped]) -> bool:
    """Return whether these tensors, keys without prefix, may be of this tower.

    They are of its kind and, in a vision transformer, of its sizes.
    """
    vision = tower.vision
    layers = vision.get("layers", 12)
    if vision.get("timm_model_name"):
        return any(key.startswith("trunk.") for key in state)
    if not isinstance(layers, int):
        return "layer1.0.conv1.weight" in state  # a ResNet
    width, patch = vision.get("width", 768), vision.get("patch_size", 16)
    size = vision.get("image_size", 224)
    high, wide = (size, size) if isinstance(size, int) else size
    expected = {
        "conv1.weight": (width, 3, patch, patch),
        "positional_embedding": ((high // patch) * (wide // patch) + 1, width),
    }
    if "proj" in state:
        expected["proj"] = (width, tower.embed_dim)
    found = {key: tuple(state[key].shape) for key in expected if key in state}
    normed = "ln_pre.weight" in state
    same = normed is not bool(vision.get("no_ln_pre")) and count_blocks(state) == layers
    return same and found == expected


def _recognised(state: Mapping[str, Shaped], passed_over: str) -> Tower:
    """Return the tower that shapes tell, where they leave no choice but that of the activation.

    `passed_over`: which configuration is another tower's.
    """
    count = count_blocks(state)
    width = state["conv1.weight"].shape[0] if "conv1.weight" in state else 0
    if not count or width not in _HEADS or "proj" not in state:
        raise ImageEncoderError(
            f"it brings no configuration{passed_over}, and its shapes (width {width}, {count} "
            "layers) do not tell heads and activation. Save the model's open_clip_config.json, or "
            "the file of its name in open_clip's model_configs, beside it with the same name and "
            "the ending .json"
        )
    needed = ("positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
    check_whole([key for key in needed if key not in state], [])
    positions, mlp = (state[key].shape[0] for key in needed)
    patch = state["conv1.weight"].shape[-1]
    vision = {
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "width": width,
        "layers": count,
        "head_width": _HEADS[width],
        "mlp_ratio": mlp / width,
    }
    return Tower(state["proj"].shape[1], vision)


def check_whole(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ImageEncoderError if a tensor is missing, or one is left over."""
    for keys, finding in ((missing, "lacks"), (unexpected, "has, beyond its configuration,")):
        if keys:
            raise ImageEncoderError(
                f"it {finding} {len(keys)} tensors of the image tower (the first: {keys[0]}). "
                "Download it again, or give it the configuration that it was trained with"
            )


def count_blocks(names: Iterable[str]) -> int:
    """Return the number of transformer blocks that tensors of these names belong to."""
    found = map(re.compile(r"transformer\.resblocks\.(\d{1,3})\.").match, names)
    return len({match[1] for match in found if match})
