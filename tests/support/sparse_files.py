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
    adapter,
    ip_adapter,
    of,
    resampler,
)
from tests.support.random_models import under

ADAPTERS: dict[str, Layout] = {
    "sd15": adapter(SD15, "base", 1024),
    "sd15_vit-G": adapter(SD15, "base", 1280),
    "sd15_plus": adapter(SD15, "plus", 1280),
    "sd15_full": adapter(SD15, "full", 1280),
    "sdxl": adapter(SDXL, "base", 1280),
    "sdxl_vit-h": adapter(SDXL, "base", 1024),
    "sdxl_plus": adapter(SDXL, "plus", 1280),
    "kolors_plus": ip_adapter(
        resampler(1024, SDXL.context, 2048, heads=12), SDXL.widths, SDXL.context
    ),
}
SIZES = {  # width, layers, heads, MLP's width, embedding, pixels
    "ViT-L": (1024, 24, 16, 4096, 768, 224),
    "ViT-L-336": (1024, 24, 16, 4096, 768, 336),
    "ViT-H": (1280, 32, 16, 5120, 1024, 224),
    "ViT-bigG": (1664, 48, 16, 8192, 1280, 224),
}


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
    """Return a whole CLIP of transformers."""
    sizes = _vision(name)
    config = CLIPConfig(vision_config=sizes, projection_dim=sizes["projection_dim"])
    return of(lambda: CLIPModel(config))


@functools.cache
def siglip(**sizes: int) -> Layout:
    """Google's SigLIP as the host loads it."""
    found = of(lambda: SiglipVisionModel(SiglipVisionConfig(**sizes)))
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
