"""UNets of the families in the host's layouts at their real sizes, without weights."""

from __future__ import annotations

import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher

from tests.support.checkpoint_layouts import SD2, SD15, SDXL

CPU = torch.device("cpu")


def models() -> dict[str, ModelPatcher]:
    """By the families' names."""
    known = comfy.supported_models
    kinds = {"SD1.5": (known.SD15, SD15), "SD2": (known.SD20, SD2), "SDXL": (known.SDXL, SDXL)}
    found = {}
    for name, (kind, size) in kinds.items():
        config = kind({})
        config.unet_config = {**size.comfy_config(), "dtype": torch.float16}
        model = config.get_model({}, device="meta")
        found[name] = ModelPatcher(model, load_device=CPU, offload_device=CPU)
    return found
