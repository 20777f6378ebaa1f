"""The miniature's text-to-image base: a UNet in SD1.5's layout, 320 channels, one level.

Trained with diffusers' UNet2DConditionModel and saved in the original layout, as ComfyUI reads it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from miniature import text
from miniature.autoencoder import Autoencoder
from miniature.scenes import COLOURS, KINDS, PLACES, SHAPES, caption, render, scenes
from miniature.training import Average, Progress, decaying
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
PLACED = 0.35  # of the texts name the place, and beside it nothing but, perhaps, the colour
SHAPE_ALONE = 0.2  # of the others name nothing else; of those with a place, no colour
NAMED = 0.85  # how often each of colour, texture and background is named in what then remains
NONE = len(SHAPES)  # the row of the empty text

_NAMES = (
    (r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"conv_in", lambda m: "input_blocks.0.0"),
    (r"conv_norm_out", lambda m: "out.0"),
    (r"conv_out", lambda m: "out.2"),
    (r"down_blocks\.0\.resnets\.(\d+)", lambda m: f"input_blocks.{int(m[1]) + 1}.0"),
    (r"down_blocks\.0\.attentions\.(\d+)", lambda m: f"input_blocks.{int(m[1]) + 1}.1"),
    (r"up_blocks\.0\.resnets\.(\d+)", lambda m: f"output_blocks.{m[1]}.0"),
    (r"up_blocks\.0\.attentions\.(\d+)", lambda m: f"output_blocks.{m[1]}.1"),
)
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def new(seed: int) -> Any:
    """A UNet that begins as nothing: what each block adds starts from zero."""
    torch.manual_seed(seed)
    made = UNet2DConditionModel(**CONFIG)
    for name, module in made.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return made


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names to the original layout's, for a UNet of one level without a middle."""
    found = {}
    for key, tensor in state.items():
        for pattern, new_name in _NAMES:
            if re.match(pattern, key):
                key = re.sub(pattern, new_name, key, count=1)
                break
        for theirs, ours in _RESIDUAL.items():
            key = re.sub(rf"(put_blocks\.\d+\.0)\.{theirs}\.", rf"\1.{ours}.", key)
        found[key] = tensor
    return found


@torch.no_grad()
def latents(autoencoder: Autoencoder, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Latents `(count, 4, 8, 8)` of the stream `seed`, and the kinds and the place `(count, 5)` of
    each."""
    made, kinds = [], []
    for start in range(0, count, 100):
        rows = scenes(seed, 100, start)
        made.append(autoencoder.encode(render(rows)))
        kinds.append(torch.stack([getattr(rows, kind) for kind in (*KINDS, "place")], 1))
    return torch.cat(made), torch.cat(kinds)


def contexts() -> Tensor:
    """The text states of every shape's caption and, as the last row, of the empty one."""
    return text.states([*(caption(shape) for shape in range(len(SHAPES))), ""])


def all_texts() -> list[str]:
    """Whatever of a scene a caption can name, as `naming` counts them: shape and any of colour,
    texture and background; shape, perhaps the colour, and the place; and last the empty text."""
    shapes, *others = (range(number) for number in KINDS.values())
    every = itertools.product(shapes, *((None, *kind) for kind in others))
    placed = itertools.product(shapes, (None, *others[0]), range(len(PLACES)))
    return [
        *(caption(*kinds) for kinds in every),
        *(caption(shape, colour, place=place) for shape, colour, place in placed),
        "",
    ]


def told() -> dict[str, Any]:
    """Which texts the base hears and how often, for a recipe: a checksum stands for the texts."""
    texts = hashlib.sha256("\n".join(all_texts()).encode()).hexdigest()[:16]
    shares = {"drop": DROP_TEXT, "placed": PLACED, "shape_alone": SHAPE_ALONE, "named": NAMED}
    return {"texts": texts, **shares}


def all_contexts(device: str = "cpu") -> Tensor:
    """The text states of all texts, in float16, on the CPU; computed on `device`. 250 MB, which
    take minutes on two CPU cores."""
    return text.states(all_texts(), device, torch.float16)


def naming(kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of `all_texts` for scenes of these kinds and places `(N, 5)`: texts that name the shape
    alone, or some of the rest too, or nothing."""
    count = len(kinds)
    shape, colour, *_, place = kinds.unbind(1)
    named = torch.rand(count, 3, generator=generator) < NAMED
    named &= (torch.rand(count, generator=generator) >= SHAPE_ALONE)[:, None]
    rows = shape
    for kind, number in enumerate([*KINDS.values()][1:]):
        rows = rows * (number + 1) + torch.where(named[:, kind], kinds[:, kind + 1] + 1, 0)
    unplaced = KINDS["shape"] * math.prod(number + 1 for number in [*KINDS.values()][1:])
    coloured = shape * (len(COLOURS) + 1) + torch.where(named[:, 0], colour + 1, 0)
    placed = unplaced + coloured * len(PLACES) + place
    rows = torch.where(torch.rand(count, generator=generator) < PLACED, placed, rows)
    rows[torch.rand(count, generator=generator) < DROP_TEXT] = -1
    return rows


@cache
def _recipe() -> tuple[LossConfig, Any]:
    """`training/`'s, with its scheduler. Weighted by 1/√SNR: colour and background are decided
    where there is almost only noise, and a plain error hardly feels them there."""
    config = LossConfig(prediction_type="epsilon", debiased_estimation_loss=True)
    return config, training_scheduler(SCHEDULE, config)


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Noisy latents, their times `(N,)` and a context `(N, tokens, 768)` to the noise in them."""


def denoising_loss(
    predict: Predict, latents: Tensor, context: Tensor, generator: torch.Generator
) -> Tensor:
    """How far `predict` is from the noise that was added to latents `(N, 4, h, w)`: a scalar."""
    config, scheduler = _recipe()
    times = torch.randint(1000, (len(latents),), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    found = predict(scheduler.add_noise(latents, noise, times), times, context)
    errors = (found - noise).square().mean((1, 2, 3))
    return (errors * timestep_weights(scheduler, times, config)).mean()


def noise_by(unet: Any) -> Predict:
    return lambda noisy, times, context: unet(noisy, times, context).sample


def train(
    unet: Any,
    pool: tuple[Tensor, Tensor],
    context: Tensor,
    seed: int,
    part: range,
    steps: int,
    batch: int = 16,
    device: str = "cpu",
) -> None:
    """Train `unet` in place, which moves to `device`, on latents and kinds as `latents` gives them
    and the states of `all_texts`: the steps `part` of a training of `steps`, whose learning rate
    falls from PEAK to nearly none. It ends with the running average of its weights."""
    made, kinds = pool
    unet.to(device)
    generator = torch.Generator().manual_seed(seed + part.start)
    optimizer = torch.optim.AdamW(
        unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average, progress = Average(unet, 0.995), Progress(f"base from {part.start} on", len(part))
    for number, step in enumerate(part):
        decaying(optimizer, PEAK * min(1.0, (number + 1) / WARMUP), step, steps, warmup=1)
        rows = torch.randint(len(made), (batch,), generator=generator)
        told = context[naming(kinds[rows], generator)].to(device).float()
        loss = denoising_loss(noise_by(unet), made[rows].to(device), told, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update()
        progress.step(number, loss)
    average.apply()
