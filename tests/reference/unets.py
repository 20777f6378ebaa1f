"""UNets of both families at any width: one set of weights, ComfyUI's model and diffusers'."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from diffusers import UNet2DConditionModel

CPU = torch.device("cpu")
POOLED, SIZE_ID = 1280, 256  # widths of SDXL's pooled text and of one number of its sizes


@dataclass(frozen=True)
class Family:
    """A layout at some size. `depths`: transformers in each level's blocks; 0 is none."""

    channels: int
    context: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    sdxl: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the cross-attention layers, down, up, middle."""
        levels = [
            (self.channels * m, depth)
            for m, depth in zip(self.multipliers, self.depths, strict=True)
        ]
        down = [width for width, depth in levels for _ in range(2 * depth)]
        up = [width for width, depth in reversed(levels) for _ in range(3 * depth)]
        return (*down, *up, *[levels[-1][0]] * self.middle)

    @property
    def middle(self) -> int:
        return max(1, self.depths[-1])

    def comfy_config(self) -> dict[str, Any]:
        per_head = self.channels * self.multipliers[-1] // self.heads[-1]
        heads = {"num_head_channels": per_head} if self.sdxl else {"num_heads": self.heads[0]}
        vector = {"adm_in_channels": POOLED + 6 * SIZE_ID, "num_classes": "sequential"}
        return {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": self.channels,
            "num_res_blocks": [2] * len(self.depths),
            "transformer_depth": [depth for depth in self.depths for _ in range(2)],
            "transformer_depth_output": [depth for depth in self.depths for _ in range(3)],
            "transformer_depth_middle": self.middle,
            "channel_mult": list(self.multipliers),
            "use_linear_in_transformer": self.sdxl,
            "context_dim": self.context,
            "use_spatial_transformer": True,
            "legacy": False,
            "dtype": torch.float32,
            **heads,
            **(vector if self.sdxl else {"adm_in_channels": None}),
        }

    def diffusers_config(self) -> dict[str, Any]:
        down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in self.depths]
        up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in self.depths[::-1]]
        vector = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_ID,
            "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_ID,
        }
        return {
            "block_out_channels": tuple(self.channels * m for m in self.multipliers),
            "down_block_types": tuple(down),
            "up_block_types": tuple(up),
            "transformer_layers_per_block": tuple(max(1, depth) for depth in self.depths),
            "attention_head_dim": self.heads,  # by an old slip, diffusers means their number
            "cross_attention_dim": self.context,
            "use_linear_projection": self.sdxl,
            **(vector if self.sdxl else {}),
        }


SD15 = Family(320, 768, (1, 2, 4, 4), (1, 1, 1, 0), (8, 8, 8, 8), sdxl=False)
SDXL = Family(320, 2048, (1, 2, 4), (0, 2, 10), (5, 10, 20), sdxl=True)
SMALL = {  # every layer, fewer channels
    "sd15": dataclasses.replace(SD15, channels=32, context=48),
    "sdxl": dataclasses.replace(SDXL, channels=32, context=48, heads=(2, 4, 8)),
}


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near 1: fan-in scaling, normalisations around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            noise *= weight[0].numel() ** -0.5
        else:
            noise.mul_(0.1).add_(name.endswith("weight"))
        weight.data = noise


@functools.lru_cache(maxsize=2)
def comfy_model(family: Family) -> ModelPatcher:
    """ComfyUI's model, its UNet randomly filled."""
    is_sdxl = family.sdxl
    config = family.comfy_config()
    supported = comfy.supported_models.SDXL if is_sdxl else comfy.supported_models.SD15
    model_config = supported(dict(config))
    model_config.unet_config = dict(config)
    model_config.manual_cast_dtype = None
    cls = comfy.model_base.SDXL if is_sdxl else comfy.model_base.BaseModel
    model = cls(model_config, device=CPU)
    fill(model.diffusion_model, seed=1)
    return ModelPatcher(model, CPU, CPU)


def diffusers_unet(family: Family) -> UNet2DConditionModel:
    """diffusers' model around the very tensors of `comfy_model`."""
    weights = comfy_model(family).model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(family.comfy_config())
    with torch.device("meta"):
        unet = UNet2DConditionModel(**family.diffusers_config())
    wanted = unet.state_dict()
    state = {theirs: weights.pop(ours) for theirs, ours in names.items() if theirs in wanted}
    if weights:
        raise AssertionError(f"diffusers' UNet has no place for {list(weights)[:4]}")
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)
