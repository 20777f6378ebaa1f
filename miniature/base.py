"""The miniature's text-to-image base: a UNet in SD1.5's layout, 320 channels, one level.

Trained with diffusers' UNet2DConditionModel and saved in the original layout, as ComfyUI reads it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from miniature.models import Autoencoder, decaying, fit, text_states
from miniature.scenes import COLORS, KINDS, PLACES, SHAPES, caption, render, scenes
from training.config import LossConfig
from training.loss import timestep_weights, training_scheduler

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (320,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD1.5's
PEAK, WARMUP = 8e-4, 50  # of the learning rate; every part of a training warms its optimiser up
DROP_TEXT = 0.1
PLACED = 0.35  # of the texts name the place, and beside it nothing but, perhaps, the color
SHAPE_ALONE = 0.2  # of the others name nothing else; of those with a place, no color
NAMED = 0.85  # how often each of color, texture and background is named in what then remains
NONE = len(SHAPES)  # the row of the empty text


def new(seed: int) -> Any:
    """Return a UNet that begins as nothing: what each block adds starts from zero."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**CONFIG)
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


@torch.no_grad()
def latents(autoencoder: Autoencoder, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return latents `(count, 4, 8, 8)` of the stream `seed`, and kinds and place `(count, 5)`."""
    encoded, kinds = [], []
    for start in range(0, count, 100):
        rows = scenes(seed, 100, start)
        encoded.append(autoencoder.encode(render(rows)))
        kinds.append(torch.stack([getattr(rows, kind) for kind in (*KINDS, "place")], 1))
    return torch.cat(encoded), torch.cat(kinds)


def contexts() -> Tensor:
    """Return the text states of every shape's caption and, as the last row, of the empty one."""
    return text_states([*(caption(shape) for shape in range(len(SHAPES))), ""])


def all_texts() -> list[str]:
    """Return all that captions can name, as `naming` counts them.

    Shape and any of color, texture and background; shape, perhaps the color, and place; nothing.
    """
    shapes, *others = (range(number) for number in KINDS.values())
    every = itertools.product(shapes, *((None, *kind) for kind in others))
    placed = itertools.product(shapes, (None, *others[0]), range(len(PLACES)))
    return [
        *(caption(*kinds) for kinds in every),
        *(caption(shape, color, place=place) for shape, color, place in placed),
        "",
    ]


def texts_recipe() -> dict[str, Any]:
    """Say for a recipe which texts the base hears and how often; a checksum stands for them."""
    texts = hashlib.sha256("\n".join(all_texts()).encode()).hexdigest()[:16]
    shares = {"drop": DROP_TEXT, "placed": PLACED, "shape_alone": SHAPE_ALONE, "named": NAMED}
    return {"texts": texts, **shares}


def all_contexts(device: str = "cpu") -> Tensor:
    """Return the text states of all texts, in float16 on the CPU: 250 MB, minutes on two cores."""
    return text_states(all_texts(), device, torch.float16)


def naming(kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Draw rows of `all_texts` for scenes of these kinds and places `(N, 5)`."""
    count = len(kinds)
    shape, color, *_, place = kinds.unbind(1)
    named = torch.rand(count, 3, generator=generator) < NAMED
    named &= (torch.rand(count, generator=generator) >= SHAPE_ALONE)[:, None]
    rows = shape
    for kind, number in enumerate([*KINDS.values()][1:]):
        rows = rows * (number + 1) + torch.where(named[:, kind], kinds[:, kind + 1] + 1, 0)
    unplaced = KINDS["shape"] * math.prod(number + 1 for number in [*KINDS.values()][1:])
    colored = shape * (len(COLORS) + 1) + torch.where(named[:, 0], color + 1, 0)
    placed = unplaced + colored * len(PLACES) + place
    rows = torch.where(torch.rand(count, generator=generator) < PLACED, placed, rows)
    rows[torch.rand(count, generator=generator) < DROP_TEXT] = -1
    return rows


@cache
def _recipe() -> tuple[LossConfig, Any]:
    """Return the trainer's loss, with its scheduler.

    Weighted by 1/√SNR: color and background are decided where there is almost only noise, and a
    plain error hardly feels them there.
    """
    config = LossConfig(prediction_type="epsilon", debiased_estimation_loss=True)
    return config, training_scheduler(SCHEDULE, config)


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Noisy latents, their times `(N,)` and a context `(N, tokens, 768)` to the noise in them."""


def denoising_loss(
    predict: Predict, latents: Tensor, context: Tensor, generator: torch.Generator
) -> Tensor:
    """Measure how far `predict` is from the noise added to latents `(N, 4, h, w)`: a scalar."""
    config, scheduler = _recipe()
    times = torch.randint(1000, (len(latents),), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    found = predict(scheduler.add_noise(latents, noise, times), times, context)
    errors = (found - noise).square().mean((1, 2, 3))
    return (errors * timestep_weights(scheduler, times, config)).mean()


def noise_by(unet: Any, autocast: torch.dtype | None = None) -> Predict:
    """Return what asks `unet` for the noise, in float32; `autocast`: what it computes in."""

    def predict(noisy: Tensor, times: Tensor, context: Tensor) -> Tensor:
        with torch.autocast(noisy.device.type, autocast, enabled=autocast is not None):
            return unet(noisy, times, context).sample.float()

    return predict


def train(
    unet: Any,
    pool: tuple[Tensor, Tensor],
    context: Tensor,
    seed: int,
    part: range,
    steps: int,
    batch: int = 16,
    device: str = "cpu",
    naming: Callable[[Tensor, torch.Generator], Tensor] = naming,
    autocast: torch.dtype | None = None,
) -> None:
    """Train `unet` in place, which moves to `device`; it ends as the average of its weights.

    `pool`: what `latents` gives; `context`: the states of `all_texts`, or those of whose rows
    `naming` draws for what the pool has beside the latents. Takes the steps `part` of a
    training of `steps`, over which the learning rate falls from PEAK to nearly none.
    """
    encoded, kinds = pool
    unet.to(device)
    generator = torch.Generator().manual_seed(seed + part.start)
    optimizer = torch.optim.AdamW(
        unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = AveragedModel(unet, multi_avg_fn=_average)  # type: ignore[arg-type]
    average.update_parameters(unet)  # the first is a copy

    def loss_at(number: int) -> Tensor:
        if number:
            average.update_parameters(unet)
        rows = torch.randint(len(encoded), (batch,), generator=generator)
        states = context[naming(kinds[rows], generator)].to(device).float()
        predict = noise_by(unet, autocast)
        return denoising_loss(predict, encoded[rows].to(device), states, generator)

    falling = decaying(PEAK, steps, warmup=1)

    def rate(number: int) -> float:
        return min(1.0, (number + 1) / WARMUP) * falling(part.start + number)

    fit(f"base from {part.start} on", optimizer, loss_at, len(part), rate, unet.parameters())
    average.update_parameters(unet)
    unet.load_state_dict(average.module.state_dict())


def _average(averages: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
    """Average weights exponentially: quick at first, slowing to a decay of 0.995."""
    torch._foreach_lerp_(averages, current, 1 - min(0.995, int(count) / (int(count) + 10)))


def ddim(config: Mapping[str, Any]) -> Any:
    """Return diffusers' scheduler that does as ComfyUI's ddim with ddim_uniform, for a base.

    ComfyUI ends at σ = 0; diffusers' default for Stable Diffusion is to end one step before.
    """
    return DDIMScheduler.from_config({**config, "set_alpha_to_one": True})


def starting_noise(scheduler: Any, seed: int, steps: int, side: int) -> Tensor:
    """Return noise `(1, 4, side, side)`: as much as there is at the first of `steps` steps.

    That is not the schedule's last. Sets the scheduler's steps.
    """
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)
    return noise * (1 - scheduler.alphas_cumprod[scheduler.timesteps[0]]).sqrt()
