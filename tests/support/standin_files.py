"""The table of stand-in models: public name, group, and what makes the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.support import checkpoint_layouts as layouts
from tests.support import layouts_clip
from tests.support import random_models as weights
from tests.support.random_models import State

VISION_WIDTH, VISION_EMBEDDING = 1024, 768  # CLIP ViT-L: hidden states, image_embeds


@dataclass(frozen=True)
class Model:
    """A stand-in: where it lies below ``models/``, its group, and what makes its tensors."""

    path: str
    group: str
    build: Callable[[], State]
    also: tuple[str, ...] = ()  # further public names of the same file


def _checkpoint_sd15(seed: int) -> State:
    text = weights.fill(layouts_clip.clip_text_l(), seed=0)
    return {
        **weights.under("model.diffusion_model.", weights.fill_unet(layouts.SD15_MINI, seed)),
        **weights.under("cond_stage_model.transformer.", text),
        **weights.under("first_stage_model.", weights.fill_vae(seed=0)),
    }


def _checkpoint_sdxl() -> State:
    text_l = weights.fill(layouts_clip.clip_text_l(), seed=0)
    text_g = weights.fill(layouts_clip.clip_text_g(), seed=0)
    return {
        **weights.under("model.diffusion_model.", weights.fill_unet(layouts.SDXL_MINI, seed=2)),
        **weights.under("conditioner.embedders.0.transformer.", text_l),
        **weights.under("conditioner.embedders.1.model.", text_g),
        **weights.under("first_stage_model.", weights.fill_vae(seed=0)),
    }


def _clip_vision(width: int, layers: int, projection: int) -> State:
    gains = {"q_proj.weight": 2.0, "patch_embedding.weight": 2.0}
    return weights.fill(layouts_clip.clip_vision(width, layers, projection), 0, gains)


def _adapter(projection: layouts.Layout, spec: layouts.UNet) -> State:
    layout = layouts_clip.ip_adapter(projection, [spec.width] * spec.layers, spec.context)
    return weights.fill(layout, seed=0, gains={"to_k_ip.weight": 2.0, "to_v_ip.weight": 1.5})


def _models() -> dict[str, Model]:
    sd, xl = layouts.SD15_MINI, layouts.SDXL_MINI
    wide, embedding = VISION_WIDTH, VISION_EMBEDDING
    base = layouts_clip.linear_projection(embedding, sd.context)
    plus = layouts_clip.resampler(wide, sd.context, width=768)
    full = layouts_clip.full_projection(wide, sd.context)
    base_xl = layouts_clip.linear_projection(embedding, xl.context)
    plus_xl = layouts_clip.resampler(wide, xl.context, width=1280)
    control_gains = {"zero_convs.0.0.weight": 0.5}
    return {
        "checkpoint": Model(
            "checkpoints/v1-5-pruned-emaonly-fp16.safetensors", "sd15", lambda: _checkpoint_sd15(0)
        ),
        "checkpoint_other": Model(
            "checkpoints/DreamShaper_8_pruned.safetensors", "other", lambda: _checkpoint_sd15(1)
        ),
        "checkpoint_sdxl": Model(
            "checkpoints/sd_xl_base_1.0.safetensors", "sdxl", _checkpoint_sdxl
        ),
        "clip_vision": Model(
            "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
            "vision",
            lambda: _clip_vision(wide, 24, embedding),
            also=("clip_vision/CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",),
        ),
        "clip_vision_h": Model(  # of ViT-H's real size: 2.5 GB in memory, on demand only
            "clip_vision/miniature-vit-h.safetensors",
            "vit-h",
            lambda: _clip_vision(1280, 32, 1024),
        ),
        "adapter": Model(
            "ipadapter/ip-adapter_sd15.safetensors", "sd15", lambda: _adapter(base, sd)
        ),
        "adapter_bin": Model("ipadapter/ip-adapter_sd15.bin", "sd15", lambda: _adapter(base, sd)),
        "adapter_plus": Model(
            "ipadapter/ip-adapter-plus_sd15.safetensors",
            "sd15",
            lambda: _adapter(plus, sd),
            also=("ipadapter/ip-adapter-plus-face_sd15.safetensors",),
        ),
        "adapter_full": Model(
            "ipadapter/ip-adapter-full-face_sd15.safetensors", "sd15", lambda: _adapter(full, sd)
        ),
        "adapter_sdxl": Model(
            "ipadapter/ip-adapter_sdxl.safetensors",
            "sdxl",
            lambda: _adapter(base_xl, xl),
            also=("ipadapter/ip-adapter_sdxl_vit-h.safetensors",),
        ),
        "adapter_plus_sdxl": Model(
            "ipadapter/ip-adapter-plus_sdxl_vit-h.safetensors",
            "sdxl",
            lambda: _adapter(plus_xl, xl),
        ),
        "controlnet": Model(
            "controlnet/control_v11p_sd15_canny_fp16.safetensors",
            "control",
            lambda: weights.fill(layouts.controlnet(sd), seed=0, gains=control_gains),
        ),
    }


MODELS = _models()
GROUPS: dict[str, tuple[str, ...]] = {
    "sd15": ("sd15", "vision"),
    "sdxl": ("sdxl", "vision"),
    "control": ("control",),
    "other": ("other",),
    "workflows": ("sd15", "sdxl", "vision", "control", "other"),
}
# What a workflow names, by kind: (folder below models/, file name).
PUBLIC_NAMES: dict[str, tuple[str, str]] = {
    name: (model.path.split("/")[0], model.path.split("/")[1]) for name, model in MODELS.items()
}
