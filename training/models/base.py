"""The base model whose parts stay frozen: from a diffusers folder, a hub id, or one file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CLIPTokenizer

from .. import fingerprints
from ..errors import TrainingError
from .diffusers_folder import DiffusersFolder, load_vae
from .layout import Family
from .single_file import SUFFIXES, SingleFile

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """A tokenizer and its CLIPTextModel, or CLIPTextModelWithProjection."""

    tokenizer: CLIPTokenizer
    encoder: Any


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What of a base turns images and texts into what its UNet sees.

    `vae`: an AutoencoderKL. `text`: one for SD1.5, two for SDXL. `weights`: a hash of
    each part as its file holds it, so the same whatever dtype it was cast to.
    """

    family: Family
    vae: Any
    text: Sequence[Text]
    name: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Base(Encoders):
    """A whole base model.

    `unet`, a UNet2DConditionModel, and `scheduler`, the configuration of its noise schedule.
    """

    unet: Any
    scheduler: Mapping[str, Any]


def load_base(
    path: str,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    unet_dtype: torch.dtype | None = None,
) -> Base:
    """All parts of a base in `dtype`, frozen: no gradients, evaluation mode, on the CPU.

    `unet_dtype`: of the UNet, if that is another.

    `path`: a diffusers folder or hub id, or a `.safetensors`/`.ckpt` in the original layout,
    which needs no network: its sizes are read off its tensors. SD1.5 and SDXL are told apart by
    what lies there. `vae` (folder, hub id or file) stands in for the base's own.

    SDXL's published VAE overflows in float16 and stays in float32 then; give a corrected one
    (`madebyollin/sdxl-vae-fp16-fix`, whose configuration has `force_upcast` off) to save that.

    Raises TrainingError for a path where nothing lies, a missing part, another family.
    """
    opened = _open(path)
    unet_dtype = unet_dtype or dtype
    unet = _frozen(opened.unet(unet_dtype), unet_dtype)
    encoders = _encoders(opened, path, dtype, vae)
    return Base(**vars(encoders), unet=unet, scheduler=dict(opened.scheduler))


def load_encoders(
    path: str, dtype: torch.dtype = torch.float32, vae: str | None = None
) -> Encoders:
    """`load_base` without the UNet, which is neither read nor held."""
    return _encoders(_open(path), path, dtype, vae)


def _encoders(
    opened: SingleFile | DiffusersFolder, path: str, dtype: torch.dtype, vae: str | None
) -> Encoders:
    if not vae:
        autoencoder = opened.vae()
    elif Path(vae).is_file():
        autoencoder = SingleFile(Path(vae)).vae_alone(opened.family)
    else:
        autoencoder = load_vae(vae)
    text = [Text(*pair) for pair in opened.text()]
    for tokenizer, encoder in text:
        rows = encoder.config.vocab_size
        if len(tokenizer) > rows:
            raise TrainingError(
                f"'{path}': the tokenizer has {len(tokenizer)} tokens, its text encoder only "
                f"{rows}. They belong to different models; get the model's own tokenizer."
            )
    read = ([*_told(encoder), tokenizer.pad_token_id] for tokenizer, encoder in text)
    weights = {
        "vae": fingerprints.of_settings(*_told(autoencoder)),
        "text encoder": fingerprints.of_settings(*read),
    }
    for _, encoder in text:
        _frozen(encoder, dtype)
    return Encoders(
        family=opened.family,
        vae=_frozen(autoencoder, _vae_dtype(autoencoder, opened.family, dtype)),
        text=text,
        name=path,
        weights=weights,
    )


def _open(path: str) -> SingleFile | DiffusersFolder:
    local = Path(path)
    if local.is_file():
        return SingleFile(local)
    if not local.exists() and local.suffix in SUFFIXES:
        raise TrainingError(f"'{path}' does not exist. Correct the path of the base model.")
    return DiffusersFolder(path)


def _vae_dtype(vae: Any, family: Family, dtype: torch.dtype) -> torch.dtype:
    # diffusers' default of force_upcast is True, so for SD1.5's, which is sound, it says nothing.
    if dtype == torch.float16 and family == "sdxl" and vae.config.force_upcast:
        logger.info("SDXL's VAE overflows in float16: it stays in float32.")
        return torch.float32
    return dtype


def _frozen(module: Any, dtype: torch.dtype) -> Any:
    # torch's own `to`: diffusers' warns of modules to be kept in float32, of which there are none.
    return nn.Module.to(module.requires_grad_(False).eval(), dtype)


# What of a configuration changes the output of equal weights.
_TELLING = (
    *("hidden_act", "num_attention_heads", "layer_norm_eps"),
    *("act_fn", "norm_num_groups", "use_quant_conv", "mid_block_add_attention"),
)


def _told(module: Any) -> tuple[str, dict[str, Any]]:
    found = {name: getattr(module.config, name, None) for name in _TELLING}
    shape = {name: value for name, value in found.items() if value is not None}
    return fingerprints.of_weights(module), shape
