"""A whole base model in one file, as it was published and as ComfyUI reads it.

diffusers converts such files, but gets their sizes from the hub. Here they are read off the
tensors and laid beside as the folder of configurations that it takes instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer

from ip_adapter_core.files.header import CheckpointError, read_header, read_pickle

from ..errors import TrainingError
from . import clip_tokenizer as clip_vocabulary
from . import layout
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
        return self._converted(UNet2DConditionModel, "unet", config, dtype)

    def vae(self) -> AutoencoderKL | AutoencoderTiny:
        return self._vae(self.family, layout.VAE)

    def vae_alone(self, family: Family) -> AutoencoderKL | AutoencoderTiny:
        """Return the VAE for a base of that family; the file may hold nothing else."""
        whole = any(key.startswith(layout.VAE) for key in self._shapes)
        return self._vae(family, layout.VAE if whole else "")

    def _vae(self, family: Family, prefix: str) -> AutoencoderKL | AutoencoderTiny:
        tiny = layout.tiny_vae(self._shapes, prefix)
        if tiny is not None:
            return self._tiny(tiny, prefix)
        config = self._config("VAE", lambda: layout.vae(self._shapes, family, prefix))
        return self._converted(AutoencoderKL, "vae", config, torch.float32)

    def _tiny(self, config: Config, prefix: str) -> AutoencoderTiny:
        """Convert TAESD's names, as diffusers does not: the decoder's clamp is no layer there."""
        names = {}
        for key in self._shapes:
            for side, skipped in (("encoder", 0), ("decoder", 1)):
                if match := re.fullmatch(re.escape(f"{prefix}taesd_{side}.") + r"(\d+)\.(.+)", key):
                    names[key] = f"{side}.layers.{int(match[1]) - skipped}.{match[2]}"
        tensors = _tensors(self.path, list(names))
        made: Any = AutoencoderTiny.from_config(config)
        with self._failing("the VAE"):
            made.load_state_dict({names[key]: x.float() for key, x in tensors.items()})
        return made

    def text(self) -> list[tuple[CLIPTokenizer, nn.Module]]:
        family, shapes = self.family, self._shapes
        configs = {
            "text_encoder": self._config("text encoder", lambda: layout.text_l(shapes, family))
        }
        if family == "sdxl":
            second = self._config("second text encoder", lambda: layout.text_g(shapes))
            configs["text_encoder_2"] = second
        kind: Any = StableDiffusionPipeline if family == "sd15" else StableDiffusionXLPipeline
        with _folder(configs) as folder, self._failing("the text encoders"):
            pipeline = kind.from_single_file(
                str(self.path),
                config=str(folder),
                local_files_only=True,
                torch_dtype=torch.float32,
                unet=None,
                vae=None,
                scheduler=None,
            )
        found = []
        for name in configs:
            encoder = getattr(pipeline, name)
            self._check_whole(encoder, name)
            found.append((getattr(pipeline, name.replace("text_encoder", "tokenizer")), encoder))
        return found

    def _config(self, part: str, make: Callable[[], Config]) -> Config:
        try:
            return make()
        except (KeyError, StopIteration) as error:
            raise self._refused(f"has no complete {part} (sought: {error})") from error
        except ValueError as error:
            raise self._refused(f"has a {part} that diffusers cannot build: {error}") from error

    def _converted(self, kind: Any, part: str, config: Config, dtype: torch.dtype) -> Any:
        with _folder({part: config}) as folder, self._failing(part):
            module = kind.from_single_file(
                str(self.path),
                config=str(folder),
                subfolder=part,
                local_files_only=True,
                torch_dtype=None if dtype == torch.float32 else dtype,  # None is quieter
            )
        self._check_whole(module, part)
        return module

    @contextmanager
    def _failing(self, part: str) -> Iterator[None]:
        try:
            yield
        except NotImplementedError as error:  # what torch says of a tensor that never came
            raise self._refused(f"lacks tensors of the {part}; download it again") from error
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise self._refused(f"has a {part} that diffusers cannot convert: {reason}") from error

    def _check_whole(self, module: nn.Module, part: str) -> None:
        missing = [name for name, tensor in module.named_parameters() if tensor.is_meta]
        if missing:
            raise self._refused(
                f"lacks tensors of the {part}: {missing[0]} and {len(missing) - 1} more "
                "(diffusers' names); download it again"
            )

    def _refused(self, finding: str) -> TrainingError:
        return TrainingError(
            f"'{self.path}' {finding}. Expected a checkpoint of SD1.5 or SDXL that holds UNet, VAE "
            "and text encoders."
        )


@contextmanager
def _folder(configs: Mapping[str, Config]) -> Iterator[Path]:
    """Return a diffusers folder without weights.

    Configurations by part, and tokenizers for the text.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        index: Config = {} if "text_encoder_2" in configs else {"requires_safety_checker": False}
        for part, config in configs.items():
            (folder / part).mkdir()
            (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
            if not part.startswith("text_encoder"):
                continue
            tokenizer = part.replace("text_encoder", "tokenizer")
            clip_vocabulary.write(folder / tokenizer, PADS[tokenizer])
            second = part == "text_encoder_2"
            model = "CLIPTextModelWithProjection" if second else "CLIPTextModel"
            index |= {
                part: ["transformers", model],
                tokenizer: ["transformers", "CLIPTokenizer"],
            }
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        yield folder


def _tensors(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    content = read_pickle(path)
    return {name: content[name] for name in names}


def _shapes(path: Path) -> Shapes:
    try:
        if path.suffix == ".safetensors":
            content: Mapping[str, Any] = read_header(path)[0]
        else:
            content = read_pickle(path, device="meta")
    except CheckpointError as error:
        raise TrainingError(f"'{path}' cannot be read as a model: {error}") from error
    return {key: tuple(value.shape) for key, value in content.items() if hasattr(value, "shape")}
