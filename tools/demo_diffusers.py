"""The demo's pictures without ComfyUI: the same files in diffusers, through its own pipeline and
its own IP-Adapter, from the same noise and at the same steps of the schedule.

A second road to the same pictures: what the two differ by is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from miniature import setup, workflows
from miniature.ddim import ddim, starting_noise
from tools.ask import Ask, Shot
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder

_LATENT_SIDE = 8  # pixels
_KIND = "image_embeds"


def _pipeline(adapter: dict[str, Tensor]) -> Any:
    """diffusers' pipeline on the miniature's checkpoint, with the adapter in its UNet."""
    base = load_base(str(setup.base_directory() / "models" / "checkpoints" / workflows.CHECKPOINT))
    (text,) = base.text
    scheduler = ddim(base.scheduler)
    made = StableDiffusionPipeline(
        base.vae, text.encoder, text.tokenizer, base.unet, scheduler, None, None, None, False
    )
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor.float()
    made.unet._load_ip_adapter_weights([parts])
    made.set_progress_bar_config(disable=True)
    return made


@torch.inference_mode()
def pictures(ask: Ask, on_step: Callable[..., None]) -> list[list[Image.Image]]:
    """The pictures of every row; ``on_step(shot, step, steps)`` after each step."""
    models = setup.base_directory() / "models"
    adapter = load_file(models / "ipadapter" / workflows.ADAPTERS["base"])
    pipeline = _pipeline(adapter)
    encoder = ImageEncoder.from_name(f"open_clip:{models / 'clip_vision' / workflows.ENCODER}")
    noise = starting_noise(pipeline.scheduler, ask.seed, ask.steps, ask.size // _LATENT_SIDE)

    def told(_: Any, step: int, time: Any, given: dict[str, Any], shot: Shot) -> dict[str, Any]:
        on_step(shot, step + 1, ask.steps)
        return given

    made = []
    for row in ask.rows:
        embeds = encoder(encoder.preprocess(row.reference)[None], _KIND)
        both = torch.cat([encoder.zero(_KIND), embeds])[:, None]
        drawn = []
        for shot in row.shots:
            pipeline.set_ip_adapter_scale(shot.weight)
            (image,) = pipeline(
                shot.text,
                negative_prompt=ask.negative,
                height=ask.size,
                width=ask.size,
                num_inference_steps=ask.steps,
                guidance_scale=ask.guidance,
                latents=noise.clone(),
                ip_adapter_image_embeds=[both],
                callback_on_step_end=partial(told, shot=shot),
            ).images
            drawn.append(image)
        made.append(drawn)
    return made
