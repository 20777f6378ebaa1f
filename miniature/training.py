"""What the small training loops share."""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import Tensor, nn

logger = logging.getLogger("comfyui_ip_adapter.tools")


def decaying(
    optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int
) -> None:
    """Set the learning rate: linear warm-up, then a cosine down to a fiftieth."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * cosine)


class Progress:
    """Tells the running mean of the loss, twenty times in all."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.every = name, steps, max(1, steps // 20)
        self.mean, self.begun = torch.zeros(()), time.monotonic()

    def step(self, step: int, loss: Tensor) -> None:
        loss = loss.detach()  # stays where it is: a GPU need not wait
        self.mean = loss if step == 0 else 0.98 * self.mean + 0.02 * loss
        if step % self.every == 0 or step == self.steps - 1:
            seconds = time.monotonic() - self.begun
            logger.info("%s: step %d, %.4f, %.0f s", self.name, step, self.mean, seconds)


class Average:
    """An exponential average of a model's weights that starts quickly and slows to `decay`."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.count = model, decay, 0
        self.state = {key: value.clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        for key, value in self.model.state_dict().items():
            self.state[key].lerp_(value, 1 - decay)

    def apply(self) -> None:
        """Give the model the average."""
        self.model.load_state_dict(self.state)
