"""What the paper compares decoupled attention with: equal image tokens, concatenated to the text.

The projection is the base adapter's and trains as long, on the same pictures, with the same
settings. There are no W'k, W'v: the frozen cross-attention reads 77 + 4 tokens (section 4.4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import get_cosine_schedule_with_warmup
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ip_adapter_core.projection import ImageProjection
from miniature import files, image_encoder, setup, workflows
from miniature.adapters import REFERENCE_STREAM, SETTINGS
from miniature.autoencoder import Autoencoder
from miniature.base import NONE, contexts, denoising_loss, noise_by
from miniature.ddim import ddim, starting_noise
from miniature.drawing import Task, as_tensor
from miniature.scenes import references, render, scenes
from miniature.training import Progress
from training.config import LossConfig
from training.models.base import load_base
from training.sampling import encode_text

WIDTH = 768
_DRAWN_AT_ONCE = 16


def new(embed_dim: int) -> ImageProjection:
    return ImageProjection(feature_dim=embed_dim, cross_attention_dim=WIDTH, tokens=4)


@torch.no_grad()
def _pool(
    autoencoder: Autoencoder, encoder: Any, seed: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, image embeddings of the references and shapes of the adapters' own pictures."""
    latents, embeds, shapes = [], [], []
    for start in range(0, count, 100):
        rows = scenes(seed + 1, 100, start)
        others = references(rows, seed + 1 + REFERENCE_STREAM, start)
        latents.append(autoencoder.encode(render(rows)))
        embeds.append(encoder(image_encoder.normalised(render(others))))
        shapes.append(rows.shape)
    return torch.cat(latents), torch.cat(embeds), torch.cat(shapes)


def train(
    autoencoder: Autoencoder,
    unet: Any,
    encoder: Any,
    asked: tuple[int, int, int],
    device: str = "cpu",
) -> ImageProjection:
    """A new one, on the CPU; trained on `device`, where the UNet moves and stays. Autoencoder and
    encoder are on the CPU. `asked`: seed, pictures, steps."""
    seed, count, steps = asked
    latents, embeds, shapes = _pool(autoencoder, encoder, seed, count)
    context = contexts()
    torch.manual_seed(seed)
    projection = new(embeds.shape[1]).to(device)
    unet.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(projection.parameters(), SETTINGS["learning_rate"])
    schedule = get_cosine_schedule_with_warmup(optimizer, SETTINGS["lr_warmup_steps"], steps)
    progress, batch = Progress("concatenated", steps), SETTINGS["train_batch_size"]
    no_text = SETTINGS["t_drop_rate"]
    no_image, neither = LossConfig.i_drop_rate, LossConfig.ti_drop_rate
    for step in range(steps):
        rows = torch.randint(count, (batch,), generator=generator)
        draw = torch.rand(batch, generator=generator)
        told, image = shapes[rows].clone(), embeds[rows].clone()
        told[(draw < neither) | (draw >= 1 - no_text)] = NONE
        image[draw < neither + no_image] = 0
        both = torch.cat([context[told].to(device), projection(image.to(device))], 1)
        loss = denoising_loss(noise_by(unet), latents[rows].to(device), both, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projection.parameters(), SETTINGS["max_grad_norm"])
        optimizer.step()
        schedule.step()
        progress.step(step, loss)
    return projection.cpu().eval().requires_grad_(False)


@torch.inference_mode()
def draw(task: Task, texts: Sequence[str]) -> Tensor:
    """Pictures `(N, 3, 64, 64)` of the shipped projection, one a reference and text, with the
    noise, steps and guidance that ComfyUI draws the decoupled ones with."""
    shown = [setup.picture(task.rows[number : number + 1]) for number in range(len(task.rows))]
    side = image_encoder.SIDE
    small = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in shown]
    pictures = torch.stack([as_tensor(picture) for picture in small])
    base = load_base(str(setup.base_directory() / "models" / "checkpoints" / workflows.CHECKPOINT))
    state = files.dequantised(load_file(files.FOLDER / files.CONCATENATED))
    encoder = image_encoder.tower(files.FOLDER / files.ENCODER)
    embeds = encoder(image_encoder.normalised(pictures))
    projection: nn.Module = new(embeds.shape[1])
    projection.load_state_dict({key: x.float() for key, x in state.items()})
    scheduler = ddim(base.scheduler)
    side = workflows.SIDE // 8
    noise = [starting_noise(scheduler, seed, workflows.STEPS, side) for seed in task.seeds]
    text = encode_text(base, texts).states
    none = encode_text(base, [""]).states
    made = []
    for start in range(0, len(pictures), _DRAWN_AT_ONCE):
        some = slice(start, start + _DRAWN_AT_ONCE)
        positive = torch.cat([text[some], projection(embeds[some])], 1)
        zero = torch.cat([none, projection(torch.zeros_like(embeds[:1]))], 1)
        both = torch.cat([zero.expand_as(positive), positive])
        latents = torch.cat(noise[some])
        for time in scheduler.timesteps:
            plain, guided = base.unet(torch.cat([latents] * 2), time, both).sample.chunk(2)
            found = plain + workflows.GUIDANCE * (guided - plain)
            latents = scheduler.step(found, time, latents).prev_sample
        made.append(base.vae.decode(latents).sample / 2 + 0.5)
    return torch.cat(made).clamp(0, 1)
