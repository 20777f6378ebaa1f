"""Random weights that behave: finite, well scaled, never zero where a picture depends on it.

Every tensor is drawn from its own generator, seeded by its key, so a file's bytes depend
on its layout and seed alone. Plain noise would make a UNet whose pictures are noise too;
two arrangements make soft fields of colour that text and image prompts visibly move:
convolutions of 3×3 are low-pass, and the UNet's estimate carries its own input, which a
denoiser must return for the sampling to converge.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.support.checkpoint_layouts import Layout, UNet, unet, vae

State = dict[str, Tensor]
_BLUR = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
_LATENT = 4
_GROUP = 10  # channels of one group of the UNet's last normalisation: 320 / 32


def draw(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers, the same for the same key, shape and seed; float32."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))
    return torch.randn(shape, generator=generator)


def _values(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if not shape:
        return torch.tensor(math.log(100.0))  # CLIP's logit_scale
    if len(shape) == 1 and "embedding" not in key:
        return draw(key, shape, seed) * 0.03 + (1.0 if key.endswith("weight") else 0.0)
    if ("embedding" in key and "patch" not in key) or key.endswith("latents"):
        return draw(key, shape, seed) * (0.3 if "position" in key else 1.0)
    if len(shape) == 4 and shape[2] == 3:
        mixing = draw(key, (*shape[:2], 1, 1), seed) / math.sqrt(shape[1])
        return mixing * _BLUR
    return draw(key, shape, seed) / math.sqrt(math.prod(shape[1:]))


def fill(layout: Layout, seed: int, gains: Mapping[str, float] | None = None) -> State:
    """Half-precision weights for a layout: unit gain, unless the key ends as ``gains`` says."""
    state: State = {}
    for key, shape in layout.items():
        values = _values(key, shape, seed)
        for ending, gain in (gains or {}).items():
            if key.endswith(ending):
                values *= gain
        state[key] = values.half().contiguous()
    return state


def fill_unet(spec: UNet, seed: int) -> State:
    """A UNet (ComfyUI's keys) that returns its input, normalised, plus a soft random field.

    Its first channels carry +x and −x of the 4 latent channels through the outermost skip
    connection; SiLU(x) − SiLU(−x) = x, so the last convolution reads x back.
    """
    gains = {
        "attn2.to_q.weight": 3.0,
        "attn2.to_out.0.weight": 2.0,
        "attn1.to_out.0.weight": 0.5,
        "ff.net.2.weight": 0.5,
        "out_layers.3.weight": 0.5,
        "out.2.weight": 0.5,
    }
    state = fill(unet(spec), seed, gains)
    last = max(int(key.split(".")[1]) for key in state if key.startswith("output_blocks."))
    carried, width = 2 * _LATENT, spec.width
    silenced = [f"output_blocks.{last}.0.out_layers.3", f"output_blocks.{last}.1.proj_out"]
    silenced += [f"output_blocks.{last}.0.skip_connection", "input_blocks.0.0"]
    for name in silenced:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state:
                state[key][:carried] = 0
    state["out.0.weight"][:_GROUP] = 1
    state["out.0.bias"][:_GROUP] = 0
    out = state["out.2.weight"]
    out -= out.mean(dim=1, keepdim=True)  # no uniform colour: SiLU's mean cancels out
    out[:, :_GROUP] = 0
    for i in range(_LATENT):
        for sign, channel in ((1.0, i), (-1.0, _LATENT + i)):
            state["input_blocks.0.0.weight"][channel, i, 1, 1] = sign
            state[f"output_blocks.{last}.0.skip_connection.weight"][channel, width + channel] = 1
            state["out.2.weight"][i, channel, 1, 1] = sign
    return state


def fill_vae(seed: int) -> State:
    """An autoencoder whose pictures are soft, balanced in colour and rarely saturated."""
    state = fill(vae(), seed, {"decoder.conv_out.weight": 1.2})
    out = state["decoder.conv_out.weight"]
    out -= out.mean(dim=1, keepdim=True)
    return state


def under(prefix: str, state: State) -> State:
    """The same tensors with ``prefix`` before every key."""
    return {prefix + key: tensor for key, tensor in state.items()}
