"""The public weights that the example workflows name, and where to get them."""

from __future__ import annotations

from dataclasses import dataclass

_HUB = "https://huggingface.co"
_ADAPTERS = f"{_HUB}/h94/IP-Adapter/resolve/main"


@dataclass(frozen=True)
class Weights:
    """A file `name` in `models/<directory>`, downloaded from `url`; `label` is for people."""

    name: str
    url: str
    directory: str
    label: str = ""

    @property
    def saved_as(self) -> str:
        """The name under which a browser saves the download."""
        return self.url.rsplit("/", 1)[-1]


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
VIT_H = Weights(
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    f"{_ADAPTERS}/models/image_encoder/model.safetensors",
    "clip_vision",
)
VIT_BIGG = Weights(
    "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",
    f"{_ADAPTERS}/sdxl_models/image_encoder/model.safetensors",
    "clip_vision",
)
BASE = Weights(
    "ip-adapter_sd15.safetensors",
    f"{_ADAPTERS}/models/ip-adapter_sd15.safetensors",
    "ipadapter",
)
PLUS = Weights(
    "ip-adapter-plus_sd15.safetensors",
    f"{_ADAPTERS}/models/ip-adapter-plus_sd15.safetensors",
    "ipadapter",
)
BASE_SDXL = Weights(
    "ip-adapter_sdxl.safetensors",
    f"{_ADAPTERS}/sdxl_models/ip-adapter_sdxl.safetensors",
    "ipadapter",
)
CANNY = Weights(
    "control_v11p_sd15_canny_fp16.safetensors",
    f"{_HUB}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_canny_fp16.safetensors",
    "controlnet",
)

PUBLIC = {
    weights.name: weights
    for weights in (SD15, DREAMSHAPER, SDXL, VIT_H, VIT_BIGG, BASE, PLUS, BASE_SDXL, CANNY)
}
