"""A whole base model in one file, as it was published and as ComfyUI reads it.

diffusers converts such files, but gets their sizes from the hub. Here they are read off the tensors
(`layout`), and diffusers' own converters rename what is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ip_adapter_core.files.header import CheckpointError, read_header, read_pickle

from ..errors import TrainingError
from . import layout
from .clip_tokenizer import tokenizer
from .diffusers_folder import PADS
from .layout import Config, Family, Shapes

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

# What the file is instead, by what keys of it begin with.
_OTHERS = {
    "cond_stage_model.model.": "Stable Diffusion 2",
    "conditioner.embedders.0.model.": "SDXL's refiner",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "down_blocks.": "a UNet alone, in diffusers' layout",
    "control_model.": "a ControlNet",
    "image_proj": "an IP-Adapter",
    "lora_": "a LoRA",
}

State = dict[str, Tensor]


class SingleFile:
    """Reads one part after the other. Raises TrainingError for what is missing or unsupported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shapes = _shapes(path)
        # A VAE alone is a valid file too; `vae_alone` says whose it is.
        self.scheduler: Mapping[str, Any] = layout.scheduler(self._shapes)

    @property
    def family(self) -> Family:
        shapes = self._shapes
        for beginning, kind in _OTHERS.items():
            if any(key.startswith(beginning) for key in shapes):
                raise self._refused(f"is {kind}")
        channels = shapes.get(f"{layout.UNET}input_blocks.0.0.weight", (0, 0))[1]
        if not channels:
            first = ", ".join(sorted(shapes)[:3]) or "none"
            raise self._refused(
                f"has no UNet: none of its {len(shapes)} tensors begins with '{layout.UNET}' (the "
                f"first ones: {first})"
            )
        if channels != 4:
            raise self._refused(
                f"has a UNet that reads {channels} channels, as inpainting and editing models do, "
                "not 4"
            )
        return "sdxl" if f"{layout.UNET}label_emb.0.0.weight" in shapes else "sd15"

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        config = self._config("UNet", lambda: layout.unet(self._shapes, self.family))
        return self._loaded(
            "unet",
            lambda: UNet2DConditionModel.from_config(config),
            lambda state, unet: convert_ldm_unet_checkpoint(state, unet.config),
            layout.UNET,
            dtype,
        )

    def vae(self) -> AutoencoderKL | AutoencoderTiny:
        return self._vae(self.family, layout.VAE)

    def vae_alone(self, family: Family) -> AutoencoderKL | AutoencoderTiny:
        """Return the VAE for a base of that family; the file may hold nothing else."""
        whole = any(key.startswith(layout.VAE) for key in self._shapes)
        return self._vae(family, layout.VAE if whole else "")

    def _vae(self, family: Family, prefix: str) -> AutoencoderKL | AutoencoderTiny:
        if tiny := layout.tiny_vae(self._shapes, prefix):
            return self._loaded("vae", lambda: AutoencoderTiny.from_config(tiny), _tiny, prefix)
        config = self._config("VAE", lambda: layout.vae(self._shapes, family, prefix))
        return self._loaded(
            "vae",
            lambda: AutoencoderKL.from_config(config),
            lambda state, vae: convert_ldm_vae_checkpoint(state, vae.config),
            prefix,
        )

    def text(self) -> list[tuple[CLIPTokenizer, nn.Module]]:
        family, shapes = self.family, self._shapes
        first = self._config("text encoder", lambda: layout.text_l(shapes, family))
        encoder = self._loaded(
            "text_encoder",
            lambda: CLIPTextModel(CLIPTextConfig(**first)),
            lambda state, _: convert_ldm_clip_checkpoint(state),
            layout.TEXT_L[family],
        )
        found = [(tokenizer(PADS["tokenizer"]), encoder)]
        if family == "sdxl":
            second = self._config("second text encoder", lambda: layout.text_g(shapes))
            encoder = self._loaded(
                "text_encoder_2",
                lambda: CLIPTextModelWithProjection(CLIPTextConfig(**second)),
                lambda state, text: convert_open_clip_checkpoint(text, state, layout.TEXT_G),
                layout.TEXT_G,
            )
            found.append((tokenizer(PADS["tokenizer_2"]), encoder))
        return found

    def _config(self, part: str, make: Callable[[], Config]) -> Config:
        try:
            return make()
        except (KeyError, StopIteration) as error:
            raise self._refused(f"has no complete {part} (sought: {error})") from error
        except ValueError as error:
            raise self._refused(f"has a {part} that diffusers cannot build: {error}") from error

    def _loaded(
        self,
        part: str,
        build: Callable[[], Any],
        convert: Callable[[State, Any], State],
        prefix: str,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """Build a part, with the tensors below `prefix` as `convert` renames them for it."""
        with self._failing(part):
            with init_empty_weights():
                module = build()
            state = convert(_tensors(self.path, prefix), module)
            if not hasattr(module, "text_model"):  # nor has CLIPTextModel, from transformers 5.6 on
                state = {key.removeprefix("text_model."): x for key, x in state.items()}
            state = {key: x.to(dtype) for key, x in state.items()}
            missing, _ = module.load_state_dict(state, strict=False, assign=True)
        if missing:
            raise self._refused(
                f"lacks tensors of the {part}: {missing[0]} and {len(missing) - 1} more "
                "(diffusers' names); download it again"
            )
        return module

    @contextmanager
    def _failing(self, part: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise self._refused(f"has a {part} that diffusers cannot convert: {reason}") from error

    def _refused(self, finding: str) -> TrainingError:
        return TrainingError(
            f"'{self.path}' {finding}. Expected a checkpoint of SD1.5 or SDXL that holds UNet, VAE "
            "and text encoders."
        )


def _tiny(state: State, _: nn.Module) -> State:
    """Rename TAESD's layers, as diffusers does not: the decoder's clamp is no layer there."""
    found = {}
    for key, tensor in state.items():
        if match := re.search(r"taesd_(encoder|decoder)\.(\d+)\.(.+)", key):
            number = int(match[2]) - (match[1] == "decoder")
            found[f"{match[1]}.layers.{number}.{match[3]}"] = tensor
    return found


def _tensors(path: Path, prefix: str) -> State:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key: file.get_tensor(key) for key in keys}
    content = read_pickle(path)
    return {key: x for key, x in content.items() if key.startswith(prefix)}


def _shapes(path: Path) -> Shapes:
    try:
        if path.suffix == ".safetensors":
            content: Mapping[str, Any] = read_header(path)[0]
        else:
            content = read_pickle(path, device="meta")
    except CheckpointError as error:
        raise TrainingError(f"'{path}' cannot be read as a model: {error}") from error
    return {key: tuple(value.shape) for key, value in content.items() if hasattr(value, "shape")}
