"""Files of real sizes that take no room on the disk: a header, and a hole for the tensors.

The encoders' shapes come from transformers and open_clip themselves.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIP
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.support.checkpoint_layouts import (
    SD15,
    SDXL,
    Layout,
    full_projection,
    ip_adapter,
    linear_projection,
    of,
    resampler,
)
from tests.support.random_models import under

ADAPTERS: dict[str, Layout] = {
    "sd15": ip_adapter(linear_projection(1024, 768), SD15.widths, 768),
    "sd15_vit-G": ip_adapter(linear_projection(1280, 768), SD15.widths, 768),
    "sd15_plus": ip_adapter(resampler(1280, 768, 768), SD15.widths, 768),
    "sd15_full": ip_adapter(full_projection(1280, 768), SD15.widths, 768),
    "sdxl": ip_adapter(linear_projection(1280, 2048), SDXL.widths, 2048),
    "sdxl_vit-h": ip_adapter(linear_projection(1024, 2048), SDXL.widths, 2048),
    "sdxl_plus": ip_adapter(resampler(1280, 2048, 1280), SDXL.widths, 2048),
}
# Width, layers, heads, MLP's width, embedding, pixels.
VIT_L, VIT_H = (1024, 24, 16, 4096, 768, 224), (1280, 32, 16, 5120, 1024, 224)
VIT_BIGG, VIT_L_336 = (1664, 48, 16, 8192, 1280, 224), (1024, 24, 16, 4096, 768, 336)
SIZES = {"ViT-L": VIT_L, "ViT-L-336": VIT_L_336, "ViT-H": VIT_H, "ViT-bigG": VIT_BIGG}


def write(path: Path, layout: Mapping[str, tuple[int, ...]], metadata: Any = None) -> Path:
    """Write a .safetensors file, float16."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, shape in layout.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


def _vision(name: str) -> dict[str, Any]:
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size projection_dim"
    return dict(zip([*names.split(), "image_size"], SIZES[name], strict=True)) | {"patch_size": 14}


@functools.cache
def vision(name: str = "ViT-H", **changes: int) -> Layout:
    """Return an image encoder of transformers."""
    return of(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**_vision(name) | changes)))


@functools.cache
def both_towers(name: str = "ViT-H") -> Layout:
    """Return a whole CLIP of transformers, its text tower small."""
    sizes = _vision(name)
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config=text, vision_config=sizes, projection_dim=sizes["projection_dim"]
    )
    return of(lambda: CLIPModel(config))


@functools.cache
def siglip() -> Layout:
    """Google's SigLIP as the host loads it."""
    config = SiglipVisionConfig(
        hidden_size=1152,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=4304,
        patch_size=14,
        image_size=384,
    )
    found = of(lambda: SiglipVisionModel(config))
    return found if "vision_model" in next(iter(found)) else under("vision_model.", found)


def config(name: str) -> dict[str, Any]:
    """open_clip's configuration of that name."""
    found: Any = open_clip.get_model_config(name)
    return {key: found[key] for key in ("embed_dim", "vision_cfg", "text_cfg")} | (
        {"quick_gelu": True} if found.get("quick_gelu") else {}
    )


@functools.cache
def clip(name: str = "ViT-H-14") -> Layout:
    """Return a whole model of open_clip."""
    return of(lambda: CLIP(**config(name)))


def tower(name: str = "ViT-H-14", prefix: str = "") -> Layout:
    """Its image tower alone."""
    found = {k.removeprefix("visual."): x for k, x in clip(name).items() if k[:7] == "visual."}
    return under(prefix, found)
