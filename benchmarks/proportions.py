"""Models small enough for a CPU whose work is divided as SD1.5's is, with its encoders.

The work is in floating-point operations of convolutions and matrix products, for one training step
on one picture. SD1.5's: VAE encoder 1117 · 10⁹, ViT-H 335, text encoder 13, UNet forward 804,
backward 860 (counted as here, on models of the published sizes without weights).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support import small_models
from tests.support.random_models import fill
from training.unet import attach, new_adapter

SD15 = {"vae": 0.356, "image encoder": 0.107, "text": 0.004, "forward": 0.256, "backward": 0.276}
TOLERANCE = 0.03
SIZE, SEEN = 128, 64  # pixels of a picture's side, and of what the image encoder reads of it
TEXT, EMBED = 64, 128  # widths of text states and image embedding


def vae() -> Any:
    return small_models.vae((24, 48, 96, 96), blocks=2)


def text_encoder() -> Any:
    return fill(CLIPTextModel(small_models.text_config(TEXT, factor=4)), 2)


def image_encoder() -> Any:
    config = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=4,
        image_size=SEEN,
        patch_size=8,
        projection_dim=EMBED,
    )
    return fill(CLIPVisionModelWithProjection(config), 3)


def unet() -> Any:
    made = UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(64, 128, 256, 256),
        attention_head_dim=2,  # the number of heads, as diffusers reads it
        cross_attention_dim=TEXT,
        norm_num_groups=8,
    )
    return fill(made, 4)


def save(folder: Path) -> None:
    """Save `base`, a diffusers folder, and `encoder`, a transformers one."""
    parts = {"vae": vae(), "unet": unet(), "text_encoder": text_encoder()}
    small_models.pipeline("sd15", **parts).save_pretrained(folder / "base")
    image_encoder().save_pretrained(folder / "encoder")
    small_models.processor(SEEN).save_pretrained(folder / "encoder")


def counted() -> dict[str, int]:
    """Count the operations of each part of a step on one image; nothing is computed."""
    with torch.device("meta"):
        diffusion = unet()
        attach(diffusion)
        adapter = new_adapter(diffusion, "base", EMBED)
        latents = torch.empty(1, 4, SIZE // 8, SIZE // 8)
        states, tokens = torch.empty(1, 77, TEXT), torch.zeros(1, 77, dtype=torch.long)
        pixels, seen = torch.empty(1, 3, SIZE, SIZE), torch.empty(1, 3, SEEN, SEEN)

        def forward() -> Any:
            keys_values = adapter(torch.empty(1, EMBED))
            given = {"ip_hidden_states": keys_values}
            return diffusion(latents, torch.zeros(1), states, cross_attention_kwargs=given).sample

        autoencoder, vision, text = vae(), image_encoder(), text_encoder()
        parts: dict[str, Callable[[], Any]] = {
            "vae": lambda: autoencoder.encode(pixels),
            "image encoder": lambda: vision(seen),
            "text": lambda: text(tokens),
        }
        found = {name: _operations(part)[0] for name, part in parts.items()}
        found["forward"], predicted = _operations(forward)
        found["backward"], _ = _operations(predicted.mean().backward)
    return found


def _operations(function: Callable[[], Any]) -> tuple[int, Any]:
    # The CPU's own attention is an operation that is not counted; as matrix products it is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = function()
    return counter.get_total_flops(), result
