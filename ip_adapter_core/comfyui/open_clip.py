"""Image towers in open_clip's layout as the host's CLIP_VISION.

The host's own loader recognises five sizes of encoder. Here the sizes come from the file's
configuration, so that any tower goes: plain CLIP vision transformers become the host's own model,
all others (ConvNeXt, ResNet, attention pooling, timm's) run as open_clip has them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management as memory
import comfy.model_patcher
import torch
from comfy.clip_vision import ClipVisionModel
from torch import Tensor, nn

from ..files.encoder_file import MEAN, STD, VISUAL, build, fitting, read
from ..files.tower_config import ImageEncoderError, Tower, check_whole

logger = logging.getLogger("comfyui_ip_adapter")
_UNKNOWN_SIZE = (
    "its tensors are named as in transformers, in a size that ComfyUI does not know. Save the "
    "open_clip model instead, with its configuration"
)
_HOST_LAYERS = 48  # that the host's conversion of names goes through


def load_image_encoder(path: str | os.PathLike[str]) -> ClipVisionModel:
    """The image encoder in a file of open_clip, as `image_tower.read` finds it; files in
    transformers' layout go to the host's own loader.

    Raises ImageEncoderError, which names the file, for one that cannot be read, is not whole, is
    no image encoder, or lacks a configuration.
    """
    path = Path(path)
    try:
        tower, state = read(path)
        return _hosts(path) if tower is None else _loaded(tower, state, path.name)
    except ImageEncoderError as error:
        raise ImageEncoderError(f"Image encoder '{path.name}': {error}.") from error


def _loaded(tower: Tower, state: dict[str, Tensor], name: str) -> ClipVisionModel:
    size = tower.image_size
    hosts = tower.plain and tower.vision.get("layers", 12) <= _HOST_LAYERS
    model = _as_hosts(tower, state) if hosts else _OpenClipVision(build(tower, state), size)
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


def _hosts(path: Path) -> ClipVisionModel:
    try:
        model = comfy.clip_vision.load(str(path))
    except (RuntimeError, UnboundLocalError) as error:  # it took the file for the nearest size
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise  # memory is short
        raise ImageEncoderError(_UNKNOWN_SIZE) from error
    if model is None:
        raise ImageEncoderError(_UNKNOWN_SIZE)
    return model


def _as_hosts(tower: Tower, state: dict[str, Tensor]) -> ClipVisionModel:
    """A plain vision transformer as the host's own model."""
    vision = tower.vision
    width = vision.get("width", 768)
    model = ClipVisionModel(
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
    """open_clip's image tower with the interface of the host's CLIP vision model."""

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
    """Runs open_clip's own module under the host's memory management."""

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
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.model, load_device=self.load_device, offload_device=offload
        )
