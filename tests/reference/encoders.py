"""One image encoder under two roofs: ComfyUI's CLIP vision model, and transformers'."""

from __future__ import annotations

import functools

import torch
from comfy.clip_vision import ClipVisionModel
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 40,
}


@functools.cache
def pair(activation: str) -> tuple[ClipVisionModel, CLIPVisionModelWithProjection]:
    """`quick_gelu` as in ViT-L/14, `gelu` as in ViT-H/14; the host keeps weights in float16."""
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, hidden_act=activation))
    generator = torch.Generator().manual_seed(0)
    for name, weight in theirs.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            noise = 0.1 * noise + name.endswith("weight")
        elif weight.ndim > 1 and "position" not in name:
            noise = noise * 1.5 / weight[0].numel() ** 0.5
        weight.data = noise.half().float()
    ours = ClipVisionModel({**SIZES, "hidden_act": activation, "model_type": "clip_vision_model"})
    missing, unexpected = ours.load_sd(theirs.state_dict())
    assert not missing
    assert not [key for key in unexpected if not key.endswith("position_ids")]
    return ours, theirs.eval()


def truth(theirs: CLIPVisionModelWithProjection, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """image_embeds and hidden_states[-2] of normalised pixels."""
    out = theirs(pixel_values=pixel_values, output_hidden_states=True)
    return out.image_embeds, out.hidden_states[-2]


def preprocessed(image: Tensor) -> Tensor:
    """`(N, H, W, 3)` of 0 … 1 as the reference's scripts prepare it."""
    pictures = [(255 * picture).round().byte().numpy() for picture in image]
    return CLIPImageProcessor()(images=pictures, return_tensors="pt")["pixel_values"]
