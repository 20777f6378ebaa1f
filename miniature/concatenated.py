"""What the paper compares decoupled attention with: equal image tokens, concatenated to the text.

The projection is the base adapter's and trains as long, on the same images, with the same
options. There are no W'k, W'v: the frozen cross-attention reads 77 + 4 tokens (section 4.4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import get_scheduler
from PIL import Image
from torch import Tensor, nn

from ip_adapter_core.projection import ImageProjection
from miniature import assemble, base, files, workflows
from miniature.adapters import OPTIONS, REFERENCE_STREAM
from miniature.base import NONE, contexts, ddim, denoising_loss, noise_by, starting_noise
from miniature.models import SIDE, Autoencoder, fit, image_tower, normalized
from miniature.scenes import references, render, scenes, to_tensor
from miniature.through_comfyui import Task
from training.config import LossConfig
from training.models.base import load_base
from training.sampling import encode_text

WIDTH = 768
_AT_ONCE = 16  # images


def new(embed_dim: int) -> ImageProjection:
    return ImageProjection(feature_dim=embed_dim, cross_attention_dim=WIDTH, tokens=4)


@torch.no_grad()
def _embeddings(encoder: Any, seed: int, count: int) -> Tensor:
    """Return the embeddings of the adapters' own references."""
    found = []
    for start in range(0, count, 100):
        others = references(scenes(seed, 100, start), seed + REFERENCE_STREAM, start)
        found.append(encoder(normalized(render(others))))
    return torch.cat(found)


def train(
    autoencoder: Autoencoder,
    unet: Any,
    encoder: Any,
    seed: int,
    count: int,
    steps: int,
    device: str = "cpu",
) -> ImageProjection:
    """Train a new projection on `device`, where the UNet moves; return it on the CPU."""
    latents, kinds = base.latents(autoencoder, seed + 1, count)
    embeds = _embeddings(encoder, seed + 1, count)
    context = contexts()
    torch.manual_seed(seed)
    projection = new(embeds.shape[1]).to(device)
    unet.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(projection.parameters(), OPTIONS["learning_rate"])
    warmup, batch = OPTIONS["lr_warmup_steps"], OPTIONS["train_batch_size"]
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    no_text = OPTIONS["t_drop_rate"]
    no_image, neither = LossConfig.i_drop_rate, LossConfig.ti_drop_rate

    def loss_at(step: int) -> Tensor:
        if step:
            schedule.step()
        rows = torch.randint(count, (batch,), generator=generator)
        draw = torch.rand(batch, generator=generator)
        texts, image = kinds[rows, 0], embeds[rows]
        texts[(draw < neither) | (draw >= 1 - no_text)] = NONE
        image[draw < neither + no_image] = 0
        both = torch.cat([context[texts].to(device), projection(image.to(device))], 1)
        return denoising_loss(noise_by(unet), latents[rows].to(device), both, generator)

    fit("concatenated", optimizer, loss_at, steps, clipped=projection.parameters())
    return projection.cpu().eval().requires_grad_(False)


@torch.inference_mode()
def draw(task: Task, texts: Sequence[str]) -> Tensor:
    """Draw images `(N, 3, 64, 64)`, one a reference and text, sampled as ComfyUI does."""
    shown = [assemble.shown(task.rows[number : number + 1]) for number in range(len(task.rows))]
    small = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in shown]
    reference_images = torch.stack([to_tensor(image) for image in small])
    model = load_base(
        str(assemble.base_directory() / "models" / "checkpoints" / workflows.CHECKPOINT)
    )
    embeds = image_tower(files.FOLDER / files.ENCODER)(normalized(reference_images))
    projection: nn.Module = new(embeds.shape[1])
    projection.load_state_dict(files.load(files.FOLDER / files.CONCATENATED))
    scheduler = ddim(model.scheduler)
    side = workflows.SIDE // 8
    noise = [starting_noise(scheduler, seed, workflows.STEPS, side) for seed in task.seeds]
    text = encode_text(model, texts).states
    none = encode_text(model, [""]).states
    images = []
    for start in range(0, len(reference_images), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        positive = torch.cat([text[some], projection(embeds[some])], 1)
        zero = torch.cat([none, projection(torch.zeros_like(embeds[:1]))], 1)
        both = torch.cat([zero.expand_as(positive), positive])
        latents = torch.cat(noise[some])
        for time in scheduler.timesteps:
            plain, guided = model.unet(torch.cat([latents] * 2), time, both).sample.chunk(2)
            found = plain + workflows.GUIDANCE * (guided - plain)
            latents = scheduler.step(found, time, latents).prev_sample
        images.append(model.vae.decode(latents).sample / 2 + 0.5)
    return torch.cat(images).clamp(0, 1)
