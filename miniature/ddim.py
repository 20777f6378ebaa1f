"""ComfyUI's ddim sampler and ddim_uniform scheduler, said in diffusers' terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor


def ddim(config: Mapping[str, Any]) -> Any:
    """The scheduler of a base. ComfyUI ends at σ = 0; diffusers' default for Stable Diffusion is to
    end one step before."""
    return DDIMScheduler.from_config({**config, "set_alpha_to_one": True})


def starting_noise(scheduler: Any, seed: int, steps: int, side: int) -> Tensor:
    """`(1, 4, side, side)`: as much as there is at the first of `steps` steps, which is not the
    schedule's last. Sets the scheduler's steps."""
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)
    return noise * (1 - scheduler.alphas_cumprod[scheduler.timesteps[0]]).sqrt()
