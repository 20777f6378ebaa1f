"""UNets of the families in the host's layouts at their real sizes, without weights."""

from __future__ import annotations

import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher

CPU = torch.device("cpu")
# As the host's model_detection writes them down.
COMMON = {
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "dtype": torch.float16,
}
SD15 = {
    **COMMON,
    "adm_in_channels": None,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "num_heads": 8,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
SD2 = {key: value for key, value in SD15.items() if key != "num_heads"}
SD2 |= {"context_dim": 1024, "use_linear_in_transformer": True, "num_head_channels": 64}
SDXL = {
    **COMMON,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_head_channels": 64,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}


def models() -> dict[str, ModelPatcher]:
    """By the families' names."""
    known = comfy.supported_models
    kinds = {"SD1.5": (known.SD15, SD15), "SD2": (known.SD20, SD2), "SDXL": (known.SDXL, SDXL)}
    found = {}
    for name, (kind, layout) in kinds.items():
        config = kind({})
        config.unet_config = dict(layout)
        model = config.get_model({}, device="meta")
        found[name] = ModelPatcher(model, load_device=CPU, offload_device=CPU)
    return found
