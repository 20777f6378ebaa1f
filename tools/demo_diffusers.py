"""Render the demo's images without ComfyUI: the same files in diffusers, from the same noise.

diffusers' own pipeline and IP-Adapter take the same steps of the schedule, so that this is a second
road to the same images: what the two differ by is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from miniature import assemble, workflows
from miniature.base import ddim, starting_noise
from tests.support.random_models import sections
from tools.comfyui.client import Progress
from tools.demo_request import DemoRequest, Render
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder

_LATENT_SIDE = 8  # pixels
_KIND = "image_embeds"


def _pipeline(models: Path) -> Any:
    """Return diffusers' pipeline on the miniature's checkpoint, with the adapter in its UNet."""
    base = load_base(str(models / "checkpoints" / workflows.CHECKPOINT))
    (text,) = base.text
    scheduler = ddim(base.scheduler)
    made = StableDiffusionPipeline(
        base.vae, text.encoder, text.tokenizer, base.unet, scheduler, None, None, None, False
    )
    state = load_file(models / "ipadapter" / workflows.ADAPTERS["base"])
    tensors = {key: tensor.float() for key, tensor in state.items()}
    made.unet._load_ip_adapter_weights([sections(tensors)])
    made.set_progress_bar_config(disable=True)
    return made


@torch.inference_mode()
def draw(
    request: DemoRequest, on_step: Callable[[Render, Progress], None]
) -> list[list[Image.Image]]:
    """Return the images of each row; `on_step` is called after each step."""
    models = assemble.base_directory() / "models"
    pipeline = _pipeline(models)
    encoder = ImageEncoder.from_name(f"open_clip:{models / 'clip_vision' / workflows.ENCODER}")
    noise = starting_noise(
        pipeline.scheduler, request.seed, request.steps, request.size // _LATENT_SIDE
    )

    def after(_: Any, step: int, time: Any, given: Any, render: Render) -> Any:
        on_step(render, Progress("", step + 1, request.steps))
        return given

    made = []
    for row in request.rows:
        embeds = encoder(encoder.preprocess(row.reference)[None], _KIND)
        both = torch.cat([encoder.zero(_KIND), embeds])[:, None]
        drawn = []
        for render in row.renders:
            pipeline.set_ip_adapter_scale(render.weight)
            (image,) = pipeline(
                render.text,
                negative_prompt=request.negative,
                height=request.size,
                width=request.size,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                latents=noise.clone(),
                ip_adapter_image_embeds=[both],
                callback_on_step_end=partial(after, render=render),
            ).images
            drawn.append(image)
        made.append(drawn)
    return made
