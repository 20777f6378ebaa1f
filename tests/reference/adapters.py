"""Adapters for any family of UNets, as a file holds them, and image prompts to go with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import ManagedAdapter, load_adapter
from comfyui_ip_adapter.ip_adapter_core.image_prompt import ImageFeatures, ImagePrompt
from safetensors.torch import save_file
from torch import Tensor

from tests.support.checkpoint_layouts import UNet, adapter


@dataclass(frozen=True)
class Encoder:
    """What an image encoder gives: widths of its embedding and states, number of states.

    `resampler`: width of a plus adapter's, None for the published one.
    """

    embed: int
    hidden: int
    patches: int
    resampler: int | None = 128

    def prompt(self, images: int, seed: int) -> ImagePrompt:
        """Random features of some images; their negative is one zero image."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        positive = randn(images, self.embed), randn(images, self.patches, self.hidden)
        zero = torch.zeros(1, self.embed), randn(1, self.patches, self.hidden)
        return ImagePrompt(ImageFeatures(*positive), ImageFeatures(*zero), "a random encoder")


SMALL_ENCODER = Encoder(embed=40, hidden=56, patches=33)
VIT_H = Encoder(embed=1024, hidden=1280, patches=257, resampler=None)


def only(prompt: ImagePrompt, number: int) -> ImagePrompt:
    """One image of a prompt."""
    states, embeds = prompt.positive.penultimate_hidden_states, prompt.positive.image_embeds
    one = ImageFeatures(embeds[number : number + 1], states[number : number + 1])
    return ImagePrompt(one, prompt.negative, prompt.encoder)


def weights(family: UNet, encoder: Encoder, kind: str) -> dict[str, Tensor]:
    """Random, large enough for the image to change the noise by much."""
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    features = encoder.embed if kind == "base" else encoder.hidden
    state = {}
    for key, shape in adapter(family, kind, features, encoder.resampler).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[key] = noise.mul_(2 / shape[-1] ** 0.5)
        else:
            state[key] = noise.mul_(0.1).add_(key.endswith("weight"))
    return state


def loaded(state: dict[str, Tensor]) -> ManagedAdapter:
    """Through a file and this pack's loader."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_file(state, path)
        return load_adapter(path)


def sections(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The layout of the official .bin files, which diffusers wants."""
    out: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in state.items():
        section, name = key.split(".", 1)
        out[section][name] = value
    return out
