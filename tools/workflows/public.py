"""The public weights that the example workflows name, and where to get them."""

from __future__ import annotations

from ip_adapter_core.files.published import BASE, BASE_SDXL_VIT_H, PLUS, PLUS_FACE, VIT_H, Weights

_HUB = "https://huggingface.co"

SD15 = Weights(
    "v1-5-pruned-emaonly-fp16.safetensors",
    f"{_HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors",
    "checkpoints",
    "SD 1.5",
)
DREAMSHAPER = Weights(
    "DreamShaper_8_pruned.safetensors",
    f"{_HUB}/Lykon/DreamShaper/resolve/main/DreamShaper_8_pruned.safetensors",
    "checkpoints",
    "DreamShaper 8",
)
SDXL = Weights(
    "sd_xl_base_1.0.safetensors",
    f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    "checkpoints",
    "SDXL",
)
CANNY = Weights(
    "control_v11p_sd15_canny_fp16.safetensors",
    f"{_HUB}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_canny_fp16.safetensors",
    "controlnet",
)

PUBLIC = {
    weights.name: weights
    for weights in (SD15, DREAMSHAPER, SDXL, VIT_H, BASE, PLUS, PLUS_FACE, BASE_SDXL_VIT_H, CANNY)
}
