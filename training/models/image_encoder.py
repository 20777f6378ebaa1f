"""The frozen CLIP image encoder, of open_clip or transformers, behind one interface."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from open_clip.utils import to_2tuple
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModelWithProjection

from ip_adapter_core.files import encoder_file
from ip_adapter_core.files.tower_config import ImageEncoderError
from ip_adapter_core.variants import FEATURE_KINDS

from .. import fingerprints
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
    """An image to `(3, s, s)` float32, picklable. `settings`: sizes and colours, plain values."""

    def __init__(self, function: Callable[[Image.Image], Tensor], settings: dict[str, Any]) -> None:
        self._function, self.settings = function, settings

    def __call__(self, image: Image.Image) -> Tensor:
        return self._function(image if image.mode == "RGB" else image.convert("RGB"))


class OpenClipTower(nn.Module):
    """`visual` of an open_clip model."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.size: int = to_2tuple(visual.image_size)[0]
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
        options = {"output_fmt": "NLC", "output_extra_tokens": True, "stop_early": hidden_only}
        out = self.visual.forward_intermediates(
            pixels, indices=[-2], intermediates_only=hidden_only, **options
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


class ImageEncoder(nn.Module):
    """Pixels `(N, 3, s, s)` to what an image prompt is made of, without gradients.

    `image_embeds (N, E)`: the projected class token, not normalised.
    `penultimate_hidden_states (N, T, W)`: what goes into the last transformer block, class token
    first and before any final norm: transformers' `hidden_states[-2]`.

    `preprocess` is the encoder's own, for one image. `weights` is a hash of parameters and
    settings as they were given, before any cast.
    """

    part = "image encoder"

    def __init__(
        self, tower: OpenClipTower | TransformersTower, preprocess: Preprocess, name: str
    ) -> None:
        super().__init__()
        self.name, self.size, self.preprocess = name, tower.size, preprocess
        self.tower = tower.requires_grad_(False).eval()
        found = preprocess(Image.new("RGB", (self.size, self.size))).shape
        if found != (3, self.size, self.size):
            raise TrainingError(
                f"'{name}' reads images of {self.size} pixels, but its preprocessing gives "
                f"{tuple(found)}. Mend its preprocessor_config.json."
            )
        self.weights = fingerprints.of_settings(
            fingerprints.of_weights(tower), tower.settings, preprocess.settings
        )
        self._zero: dict[str, Tensor] = {}

    @staticmethod
    def from_name(name: str, dtype: torch.dtype = torch.float32) -> ImageEncoder:
        """Return the encoder of that name, in `dtype` on the CPU.

        `open_clip:MODEL/WEIGHTS`, `open_clip:MODEL@FILE`, `open_clip:FILE`, or the folder or id
        of a transformers CLIP model. Raises TrainingError for what gives no such encoder.
        """
        load: Any = _open_clip_tower if name.startswith(OPEN_CLIP) else _transformers_tower
        tower, preprocess = load(name)
        return ImageEncoder(tower, preprocess, name).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stays in evaluation mode, whatever it is part of: it is frozen."""
        return super().train(False)

    def feature_dim(self, kind: str) -> int:
        """Width of the features of that kind."""
        return self.zero(kind).shape[-1]

    def forward(self, pixels: Tensor, kind: str) -> Tensor:
        """`(N, E)` or `(N, T, W)`, as `kind` says."""
        return self.features(pixels, [kind])[kind]

    @torch.no_grad()
    def features(self, pixels: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Return the features of each of `kinds`, from one pass."""
        for kind in kinds:
            if kind not in FEATURE_KINDS:
                raise ValueError(
                    f"There are no features {kind!r}; expected {' or '.join(FEATURE_KINDS)}."
                )
        return self.tower.features(pixels.to(self.device, self.dtype), kinds)

    def zero(self, kind: str) -> Tensor:
        """Return what stands for a dropped image, `(1, E)` or `(1, T, W)`.

        Zeros in place of the embedding; the hidden states of zero *normalised* pixels
        (tencent-ailab/IP-Adapter, tutorial_train.py and tutorial_train_plus.py).
        """
        if kind not in self._zero:
            found = self(torch.zeros(1, 3, self.size, self.size), kind)
            self._zero[kind] = torch.zeros_like(found) if kind == FEATURE_KINDS[0] else found
        return self._zero[kind].to(self.device, self.dtype)


def of_open_clip(model: Any) -> tuple[OpenClipTower, Preprocess]:
    """Return the image tower of an open_clip model, and the preprocessing that it carries."""
    return _open_clip(model.visual, open_clip.get_model_preprocess_cfg(model))


def _open_clip(visual: Any, settings: dict[str, Any]) -> tuple[OpenClipTower, Preprocess]:
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return OpenClipTower(visual), Preprocess(transform, settings)


def of_transformers(
    model: CLIPVisionModelWithProjection, processor: Any
) -> tuple[TransformersTower, Preprocess]:
    """Return a transformers model and the preprocessing of its image processor."""
    settings = {name: getattr(processor, name, None) for name in _SHAPING}
    return TransformersTower(model), Preprocess(partial(_processed, processor), settings)


def _processed(processor: Any, image: Image.Image) -> Tensor:
    return processor(images=image, return_tensors="pt").pixel_values[0]


def _open_clip_tower(name: str) -> tuple[OpenClipTower, Preprocess]:
    if (file := Path(name.removeprefix(OPEN_CLIP))).is_file():
        return _of_file(file, name)
    try:
        return of_open_clip(create_open_clip(name)[0])
    except TrainingError:
        raise
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(f"'{name}' cannot be loaded by open_clip: {reason}") from error


def create_open_clip(name: str) -> tuple[Any, str]:
    """Return the whole model of `open_clip:MODEL/WEIGHTS` or `open_clip:MODEL@FILE`, and MODEL.

    Raises what open_clip raises if there is none.
    """
    model, weights, settings = parsed_name(name)
    with warnings.catch_warnings():  # of the activation, which `settings` sets right
        warnings.filterwarnings("ignore", message="QuickGELU mismatch")
        return open_clip.create_model(model, weights, require_pretrained=True, **settings), model


def _of_file(file: Path, name: str) -> tuple[OpenClipTower, Preprocess]:
    """Read an image tower with its configuration inside or beside, as ComfyUI's node does."""
    try:
        tower, state = encoder_file.read(file)
        if tower is None:
            raise ImageEncoderError(
                "its tensors are named as in transformers; give the folder that holds it"
            )
        usual = {"mean": encoder_file.MEAN, "std": encoder_file.STD}
        shaping = {**usual, **tower.preprocess, "size": tower.image_size}
        visual = encoder_file.build(tower, {key: x.float() for key, x in state.items()})
    except ImageEncoderError as error:
        raise TrainingError(f"'{name}': {error}.") from error
    known = {field.name for field in fields(PreprocessCfg)}
    return _open_clip(visual, {key: value for key, value in shaping.items() if key in known})


def parsed_name(name: str) -> tuple[str, str | None, dict[str, Any]]:
    """Model, weights (none for a folder or hub id, which hold both) and what weights ask for."""
    rest = name.removeprefix(OPEN_CLIP)
    if rest.startswith(("hf-hub:", "local-dir:")):
        return rest, None, {}
    model, at, file = rest.partition("@")
    tag = ""
    if not at and "/" in rest:
        model, _, tag = rest.rpartition("/")
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


def _transformers_tower(name: str) -> tuple[TransformersTower, Preprocess]:
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
