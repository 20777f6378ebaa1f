"""The miniature's structure control and second base, both small additions to the first base.

The control is a ControlNet (arXiv 2302.05543) whose encoder is the base's own, unchanged: what
trains is the network that reads the edges, and the convolutions that begin as zeros. ComfyUI reads
it as a control LoRA, which takes all else from the model that it is used with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from kornia.filters import canny
from torch import Tensor, nn

from miniature import low_rank
from miniature.autoencoder import Autoencoder
from miniature.base import contexts, denoising_loss
from miniature.scenes import SHAPES, Scenes, outlined, render, scenes
from miniature.training import Progress, decaying

HINTS = (3, 16, 16, 32, 32, 96, 96, 256)  # channels of the network that reads the edges
STRIDED = (2, 4, 6)  # which of its convolutions halve the picture
LOW, HIGH = 0.4, 0.8  # thresholds of the edges, those of the workflow
RANK = 16  # of the second base's change
CHANGED = ("down_blocks.", "up_blocks.", "conv_in", "conv_out")  # the parts that it is in


def edges(pictures: Tensor) -> Tensor:
    """White outlines on black, `(N, 3, h, w)`, as ComfyUI's Canny node gives them."""
    return canny(pictures, LOW, HIGH)[1].repeat(1, 3, 1, 1)


class Control(nn.Module):
    """Edges and noisy latents to what is added to the UNet's two skip connections."""

    def __init__(self, width: int = 320) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (into, out) in enumerate(zip(HINTS, (*HINTS[1:], width), strict=True)):
            layers += [nn.Conv2d(into, out, 3, 2 if number in STRIDED else 1, 1), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers[:-1])
        for layer in layers:  # so that what there is of edges comes through all eight
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight, gain=2)  # SiLU halves
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.zero_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 1)) for _ in range(2))
        for parameter in self.zero_convs.parameters():
            nn.init.zeros_(parameter)

    def forward(self, unet: Any, latents: Tensor, times: Tensor, hints: Tensor) -> list[Tensor]:
        """`latents (N, 4, h, w)`, `hints (N, 3, 8 h, 8 w)` to two `(N, width, h, w)`."""
        emb = unet.time_embedding(unet.time_proj(times).to(latents.dtype))
        first = unet.conv_in(latents) + self.input_hint_block(hints)
        second = unet.down_blocks[0].resnets[0](first, emb)
        return [zero(h) for zero, h in zip(self.zero_convs, (first, second), strict=True)]

    def comfyui(self, width: int = 320, time: int = 1280) -> dict[str, Tensor]:
        """As ComfyUI's ControlNetLoader reads it. The base has no middle block, but ComfyUI's
        ControlNet always has one: here one of zeros, whose output is nothing."""
        found = {"lora_controlnet": torch.zeros(0), **self.state_dict()}
        middle = {
            "in_layers.0.weight": (width,),
            "in_layers.0.bias": (width,),
            "in_layers.2.weight": (width, width, 3, 3),
            "in_layers.2.bias": (width,),
            "emb_layers.1.weight": (width, time),
            "emb_layers.1.bias": (width,),
            "out_layers.0.weight": (width,),
            "out_layers.0.bias": (width,),
            "out_layers.3.weight": (width, width, 3, 3),
            "out_layers.3.bias": (width,),
        }
        found |= {f"middle_block.0.{name}": torch.zeros(shape) for name, shape in middle.items()}
        found["middle_block_out.0.weight"] = torch.zeros(width, width, 1, 1)
        found["middle_block_out.0.bias"] = torch.zeros(width)
        return found


FromPictures = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Pictures, and then what base.Predict takes, to the noise."""


def train_control(
    autoencoder: Autoencoder, unet: Any, seed: int, steps: int, device: str = "cpu"
) -> Control:
    """A new one, on the CPU; trained on `device`, where autoencoder and UNet move and stay. Half of
    the texts are dropped, so that the edges alone are enough."""
    torch.manual_seed(seed)
    control = Control().to(device)
    autoencoder.to(device)
    unet.to(device)

    def predict(pictures: Tensor, noisy: Tensor, times: Tensor, context: Tensor) -> Tensor:
        added = control(unet, noisy, times, edges(pictures))
        return unet(
            noisy,
            times,
            context,
            down_block_additional_residuals=added,
            mid_block_additional_residual=torch.zeros(()),
        ).sample

    _fit("control", control.parameters(), predict, autoencoder, render, seed, steps, 1e-3, 0.5)
    return control.cpu().eval().requires_grad_(False)


def restyle(
    autoencoder: Autoencoder, unet: Any, seed: int, steps: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Fine-tune `unet` in place on outlined pictures, by a change of low rank. Returns its factors,
    in diffusers' names, on the CPU; autoencoder and UNet move to `device` and stay there."""
    torch.manual_seed(seed)
    changes = low_rank.add(unet, RANK, CHANGED)
    autoencoder.to(device)
    unet.to(device)
    parameters = [part for change in changes.values() for part in change.parameters()]

    def predict(pictures: Tensor, noisy: Tensor, times: Tensor, context: Tensor) -> Tensor:
        return unet(noisy, times, context).sample

    _fit("second base", parameters, predict, autoencoder, outlined, seed, steps, 1e-3, 0.1)
    return {name: factor.cpu() for name, factor in low_rank.factors(changes).items()}


def _fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    predict: FromPictures,
    autoencoder: Autoencoder,
    draw: Callable[[Scenes], Tensor],
    seed: int,
    steps: int,
    peak: float,
    drop_text: float,
    batch: int = 16,
) -> None:
    """Train `parameters` so that `predict` finds the noise in the latents of `draw`'s pictures, all
    on the autoencoder's device."""
    device = next(autoencoder.parameters()).device
    context = contexts().to(device)
    generator = torch.Generator().manual_seed(seed)
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    progress = Progress(name, steps)
    for step in range(steps):
        decaying(optimizer, peak, step, steps, warmup=20)
        rows = scenes(seed + 2, batch, step * batch)
        pictures = draw(rows).to(device)
        with torch.no_grad():
            latents = autoencoder.encode(pictures)
        told = rows.shape.clone()
        told[torch.rand(batch, generator=generator) < drop_text] = len(SHAPES)
        loss = denoising_loss(
            partial(predict, pictures), latents, context[told.to(device)], generator
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.step(step, loss)
