"""The parts of a base model in diffusers' layout, from a folder or from the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import TrainingError
from . import clip_tokenizer
from .layout import Family

SD2_WIDTH = 1024  # of its text states; SD1.5's are 768 wide, SDXL's 2048
CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
# SDXL's second tokenizer fills up with "!" (0), as OpenCLIP does with zeros.
PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
PARTS = (
    "Expected a diffusers folder with unet/, vae/, text_encoder/ and scheduler/ (SDXL: "
    "text_encoder_2/ too)"
)

logger = logging.getLogger(__name__)


class DiffusersFolder:
    """Reads one part after the other. Raises TrainingError for what is missing or unsupported."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.family: Family = _family(self._read(UNet2DConditionModel.load_config, "unet"), path)
        self.scheduler: Mapping[str, Any] = self._read(DDPMScheduler.load_config, "scheduler")

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        return load_part(UNet2DConditionModel, self.path, "unet", dtype)

    def vae(self) -> AutoencoderKL:
        return load_part(AutoencoderKL, self.path, "vae", torch.float32)

    def text(self) -> list[tuple[CLIPTokenizer, nn.Module]]:
        names = ["text_encoder"] if self.family == "sd15" else [*CLASSES]
        return [
            (
                self._tokenizer(name.replace("text_encoder", "tokenizer")),
                load_part(CLASSES[name], self.path, name, torch.float32),
            )
            for name in names
        ]

    def _tokenizer(self, name: str) -> CLIPTokenizer:
        if Path(self.path).is_dir() and not Path(self.path, name).is_dir():
            logger.info("'%s' has no %s/: CLIP's own vocabulary is used.", self.path, name)
            return clip_tokenizer.tokenizer(PADS[name])
        return self._read(CLIPTokenizer.from_pretrained, name)

    def _read(self, read: Any, part: str) -> Any:
        try:
            return read(self.path, subfolder=part)
        except (OSError, ValueError) as error:
            raise _missing(self.path, part, error) from error


def load_vae(path: str) -> AutoencoderKL:
    """Load an autoencoder that lies alone, or a whole model's: `vae/` below `path`, if there is."""
    part = "vae" if Path(path, "vae").is_dir() else None
    return load_part(AutoencoderKL, path, part, torch.float32)


def load_part(
    kind: Any, path: str, part: str | None, dtype: torch.dtype, expected: str = PARTS
) -> Any:
    """`kind.from_pretrained`, refusing weights that are not whole.

    A model saved as fp16 variant only is found too. `expected` goes into the message of the
    TrainingError for what cannot be loaded.
    """
    name = part or kind.__name__
    load = partial(kind.from_pretrained, path, torch_dtype=dtype, output_loading_info=True)
    load = partial(load, subfolder=part) if part else load
    try:
        try:
            model, info = load()
        except (OSError, ValueError) as error:
            try:
                model, info = load(variant="fp16")
            except (OSError, ValueError):
                raise error from None
    except (OSError, ValueError, RuntimeError) as error:
        raise _missing(path, name, error, expected) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise TrainingError(
            f"'{path}': {name} is incomplete: {len(missing)} tensors are missing, "
            f"{missing[0]} among them. Download it again."
        )
    return model


def _family(config: Mapping[str, Any], path: str) -> Family:
    channels, added = config.get("in_channels"), config.get("addition_embed_type")
    if channels != 4:
        raise TrainingError(
            f"'{path}': its UNet reads {channels} channels, as inpainting and editing models do; "
            "expected 4. Give a text-to-image model of SD1.5 or SDXL."
        )
    if added == "text_time":
        return "sdxl"
    if added is None and config.get("cross_attention_dim") != SD2_WIDTH:
        return "sd15"
    kind = "Stable Diffusion 2" if added is None else f"of another kind ({added})"
    raise TrainingError(
        f"'{path}' is {kind}; expected SD1.5 or SDXL, for which IP-Adapter's layout is published."
    )


def _missing(path: str, part: str, error: Exception, expected: str = PARTS) -> TrainingError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    folder = Path(path)
    if folder.is_dir():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
        return TrainingError(
            f"'{path}': {part} cannot be loaded: {reason} {expected}; found {found}."
        )
    return TrainingError(
        f"'{path}' is neither a file nor a folder here, and {part} cannot be had from the hub by "
        f"that name: {reason}"
    )
