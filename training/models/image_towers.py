"""Image towers of open_clip and transformers, by name, each with its own preprocessing."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import open_clip
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModelWithProjection

from ip_adapter_core.files import encoder_file as image_tower

from ..errors import TrainingError
from .diffusers_folder import load_part

OPEN_CLIP = "open_clip:"
# The reference preprocesses with Pillow, whose bicubic is not torchvision's of tensors.
_SHAPING = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
Processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)


class Preprocess:
    """A picture to `(3, s, s)` float32; can be sent to another process.

    `settings`: sizes and colours, as plain values.
    """

    def __init__(self, function: Callable[[Image.Image], Tensor], settings: dict[str, Any]) -> None:
        self._function, self.settings = function, settings

    def __call__(self, picture: Image.Image) -> Tensor:
        return self._function(picture if picture.mode == "RGB" else picture.convert("RGB"))


class OpenClipTower(nn.Module):
    """`visual` of an open_clip model."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        size: Any = visual.image_size
        self.size: int = size if isinstance(size, int) else size[0]
        parts = [*visual.modules()]
        self.settings = {
            "kinds": sorted({type(part).__name__ for part in parts}),  # QuickGELU or GELU
            "heads": [part.num_heads for part in parts if hasattr(part, "num_heads")],
        }

    def features(self, pixels: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        if "penultimate_hidden_states" not in kinds:
            out = self.visual(pixels)  # CoCa's gives its tokens too
            return {"image_embeds": out[0] if isinstance(out, tuple) else out}
        if not isinstance(self.visual, VisionTransformer):
            raise TrainingError(
                f"The image tower is a {type(self.visual).__name__}, without the hidden states "
                "of a CLIP vision transformer. Train the base variant with it, or take a ViT."
            )
        hidden_only = "image_embeds" not in kinds
        out = self.visual.forward_intermediates(
            pixels,
            indices=[-2],
            stop_early=hidden_only,
            intermediates_only=hidden_only,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens = out["image_intermediates_prefix"][0], out["image_intermediates"][0]
        found = {"penultimate_hidden_states": torch.cat(tokens, dim=1)}
        return found if hidden_only else found | {"image_embeds": out["image_features"]}


class TransformersTower(nn.Module):
    """A `CLIPVisionModelWithProjection`."""

    def __init__(self, model: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.size: int = config.image_size
        telling = ("hidden_act", "num_attention_heads", "layer_norm_eps")
        self.settings = {name: getattr(config, name) for name in telling}

    def features(self, pixels: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        hidden = "penultimate_hidden_states" in kinds
        out = self.model(pixel_values=pixels, output_hidden_states=hidden)
        found = {"penultimate_hidden_states": out.hidden_states[-2]} if hidden else {}
        return found | ({"image_embeds": out.image_embeds} if "image_embeds" in kinds else {})


Tower: TypeAlias = OpenClipTower | TransformersTower


def of_open_clip(model: Any) -> tuple[OpenClipTower, Preprocess]:
    """The image tower of an open_clip model, and the preprocessing that the model carries."""
    settings = open_clip.get_model_preprocess_cfg(model)
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return OpenClipTower(model.visual), Preprocess(transform, settings)


def of_transformers(
    model: CLIPVisionModelWithProjection, processor: Any
) -> tuple[TransformersTower, Preprocess]:
    """A transformers model and the preprocessing of its image processor."""
    settings = {name: getattr(processor, name, None) for name in _SHAPING}
    return TransformersTower(model), Preprocess(partial(_processed, processor), settings)


def _processed(processor: Any, picture: Image.Image) -> Tensor:
    return processor(images=picture, return_tensors="pt").pixel_values[0]


def open_clip_tower(name: str) -> tuple[OpenClipTower, Preprocess]:
    """By `open_clip:MODEL/WEIGHTS`, `open_clip:MODEL@FILE` or `open_clip:FILE`. Raises
    TrainingError."""
    if (file := Path(name.removeprefix(OPEN_CLIP))).is_file():
        return _of_file(file, name)
    model, weights, settings = parsed_name(name)
    try:
        with warnings.catch_warnings():  # of the activation, which `settings` sets right
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            made = open_clip.create_model(model, weights, require_pretrained=True, **settings)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(f"'{name}' cannot be loaded by open_clip: {reason}") from error
    return of_open_clip(made)


def _of_file(file: Path, name: str) -> tuple[OpenClipTower, Preprocess]:
    """An image tower with its configuration inside or beside, as the node of ComfyUI reads it."""
    try:
        tower, state = image_tower.read(file)
        if tower is None:
            raise image_tower.ImageEncoderError(
                "its tensors are named as in transformers; give the folder that holds it"
            )
        size = tower.image_size
        visual = image_tower.build(tower, {key: x.float() for key, x in state.items()})
    except image_tower.ImageEncoderError as error:
        raise TrainingError(f"'{name}': {error}.") from error
    shaping = {"mean": image_tower.MEAN, "std": image_tower.STD, **tower.preprocess, "size": size}
    known = {field.name for field in fields(PreprocessCfg)}
    settings = {key: value for key, value in shaping.items() if key in known}
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return OpenClipTower(visual), Preprocess(transform, settings)


def parsed_name(name: str) -> tuple[str, str | None, dict[str, Any]]:
    """Model, weights (none for a folder or hub id, which hold both) and what weights ask for."""
    rest = name.removeprefix(OPEN_CLIP)
    if rest.startswith(("hf-hub:", "local-dir:")):
        return rest, None, {}
    model, at, file = rest.partition("@")
    tag = ""
    if not at:
        model, _, tag = rest.rpartition("/") if "/" in rest else (rest, "", "")
    if model not in open_clip.list_models():
        like = difflib.get_close_matches(model, open_clip.list_models(), cutoff=0.5)
        raise TrainingError(
            f"'{name}': open_clip has no model '{model}'. Alike are: {', '.join(like) or 'none'}; "
            "open_clip.list_models() names all."
        )
    if at:
        if not Path(file).is_file():
            raise TrainingError(f"'{name}': there is no file '{file}'. Correct the path.")
        return model, file, {}
    found = open_clip.get_pretrained_cfg(model, tag)
    if not found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise TrainingError(
            f"'{name}': open_clip has no weights '{tag}' for {model}. There are: {tags}. Write "
            f"{OPEN_CLIP}{model}/WEIGHTS, or {OPEN_CLIP}{model}@FILE for weights of your own."
        )
    # OpenAI's and some later weights were trained with another activation than the model's
    # configuration has; the weights are right.
    return model, tag, {"quick_gelu": bool(found.get("quick_gelu", False))}


def transformers_tower(name: str) -> tuple[TransformersTower, Preprocess]:
    """By folder or hub id of a CLIP model. Raises TrainingError."""
    expected = (
        "Expected the folder or hub id of a transformers CLIP vision model, or "
        f"{OPEN_CLIP}MODEL/WEIGHTS"
    )
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"'{name}' cannot be loaded: {reason} {expected}.") from error
    if kind not in ("clip", "clip_vision_model"):
        raise TrainingError(f"'{name}' is a model of type '{kind}'. {expected}.")
    model = load_part(CLIPVisionModelWithProjection, name, None, torch.float32, expected)
    try:
        processor = Processor.from_pretrained(name)
    except OSError:  # the published image_encoder folders come without
        side = model.config.image_size
        crop = {"height": side, "width": side}
        processor = Processor(size={"shortest_edge": side}, crop_size=crop)
    return of_transformers(model, processor)
