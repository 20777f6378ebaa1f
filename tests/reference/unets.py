"""UNets of both families at any width: one set of weights, ComfyUI's model and diffusers'."""

from __future__ import annotations

import dataclasses
import functools

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from diffusers import UNet2DConditionModel

from tests.support.checkpoint_layouts import SD15, SDXL, UNet
from tests.support.random_models import fill

CPU = torch.device("cpu")
SMALL = {  # every layer, fewer channels
    "sd15": dataclasses.replace(SD15, channels=32, context=48),
    "sdxl": dataclasses.replace(SDXL, channels=32, context=48, heads=(2, 4, 8)),
}


@functools.lru_cache(maxsize=2)
def comfy_model(family: UNet) -> ModelPatcher:
    """ComfyUI's model, its UNet randomly filled."""
    is_sdxl = family.sdxl
    config = {**family.comfy_config(), "dtype": torch.float32}
    supported = comfy.supported_models.SDXL if is_sdxl else comfy.supported_models.SD15
    model_config = supported(dict(config))
    model_config.unet_config = dict(config)
    model_config.manual_cast_dtype = None
    cls = comfy.model_base.SDXL if is_sdxl else comfy.model_base.BaseModel
    model = cls(model_config, device=CPU)
    fill(model.diffusion_model, seed=1)
    return ModelPatcher(model, CPU, CPU)


def diffusers_unet(family: UNet) -> UNet2DConditionModel:
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
