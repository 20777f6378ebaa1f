"""The miniature's structure control and second base, both small additions to the first base.

The control is a ControlNet (arXiv 2302.05543) whose encoder is the base's own, unchanged: what
trains is the network that reads the edges, and the convolutions that begin as zeros. ComfyUI reads
it as a control LoRA, which takes all else from the model that it is used with. The second base is
the first, fine-tuned by a change of low rank in every weight (LoRA, arXiv 2106.09685): a weight W,
seen as a matrix of output channels by all else, becomes W + up · down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from kornia.filters import canny
from torch import Tensor, nn
from torch.nn.utils import parametrize

from miniature.base import NONE, contexts, denoising_loss, noise_by
from miniature.models import Autoencoder, decaying, fit
from miniature.scenes import Scenes, outlined, render, scenes

HINTS = (3, 16, 16, 32, 32, 96, 96, 256)  # channels of the network that reads the edges
STRIDED = (2, 4, 6)  # which of its convolutions halve the image
LOW, HIGH = 0.4, 0.8  # thresholds of the edges, those of the workflow
WIDTH, TIME = 320, 1280  # of the base and of its time embedding
RANK = 16  # of the second base's change
CHANGED = ("down_blocks.", "up_blocks.", "conv_in", "conv_out")  # the parts that it is in
_DOWN, _UP = ".down", ".up"


def edges(images: Tensor) -> Tensor:
    """Draw white outlines on black, `(N, 3, h, w)`, as ComfyUI's Canny node gives them."""
    return canny(images, LOW, HIGH)[1].repeat(1, 3, 1, 1)


class Control(nn.Module):
    """Edges and noisy latents to what is added to the UNet's two skip connections."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (into, out) in enumerate(zip(HINTS, (*HINTS[1:], WIDTH), strict=True)):
            layers += [nn.Conv2d(into, out, 3, 2 if number in STRIDED else 1, 1), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers[:-1])
        for layer in layers:  # so that what there is of edges comes through all eight
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight, gain=2)  # SiLU halves
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.zero_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1)) for _ in range(2))
        for parameter in self.zero_convs.parameters():
            nn.init.zeros_(parameter)

    def forward(self, unet: Any, latents: Tensor, times: Tensor, hints: Tensor) -> list[Tensor]:
        """Turn `latents (N, 4, h, w)` and `hints (N, 3, 8 h, 8 w)` into two `(N, WIDTH, h, w)`."""
        emb = unet.time_embedding(unet.time_proj(times).to(latents.dtype))
        first = unet.conv_in(latents) + self.input_hint_block(hints)
        second = unet.down_blocks[0].resnets[0](first, emb)
        return [zero(h) for zero, h in zip(self.zero_convs, (first, second), strict=True)]

    def comfyui(self) -> dict[str, Tensor]:
        """Return it as ComfyUI's ControlNetLoader reads it.

        A ControlNet always has a middle block there, which the base has not: here one of zeros.
        """
        middle = {
            "middle_block.0.in_layers.0": (WIDTH,),
            "middle_block.0.in_layers.2": (WIDTH, WIDTH, 3, 3),
            "middle_block.0.emb_layers.1": (WIDTH, TIME),
            "middle_block.0.out_layers.0": (WIDTH,),
            "middle_block.0.out_layers.3": (WIDTH, WIDTH, 3, 3),
            "middle_block_out.0": (WIDTH, WIDTH, 1, 1),
        }
        found = {"lora_controlnet": torch.zeros(0), **self.state_dict()}
        for name, shape in middle.items():
            found[f"{name}.weight"], found[f"{name}.bias"] = torch.zeros(shape), torch.zeros(WIDTH)
        return found


class LowRank(nn.Module):
    """Begins as no change: `up` is zeros."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.down = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def add_low_rank(model: nn.Module, rank: int, inside: tuple[str, ...]) -> dict[str, LowRank]:
    """Give all matrices whose names begin with `inside` a change that trains; return these."""
    found = {}
    for name, module in [*model.named_modules()]:
        weight: Any = getattr(module, "weight", None)
        if name.startswith(inside) and isinstance(weight, nn.Parameter) and weight.ndim > 1:
            change = LowRank(weight, rank)
            parametrize.register_parametrization(module, "weight", change)
            found[f"{name}.weight"] = change
    return found


def factors(changes: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return changes as they are kept in a file: two matrices a weight."""
    return {
        name + suffix: matrix.detach()
        for name, change in changes.items()
        for suffix, matrix in ((_DOWN, change.down), (_UP, change.up))
    }


def merged(state: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the changes that `factors` gave, in the weights' own precision.

    Raises KeyError for a change without its weight or its other half.
    """
    found = dict(state)
    for key in kept:
        if key.endswith(_UP):
            name = key.removesuffix(_UP)
            weight, up, down = found[name], kept[key].float(), kept[name + _DOWN].float()
            changed = weight.float() + (up @ down).reshape(weight.shape)
            found[name] = changed.to(weight.dtype)
        elif key.removesuffix(_DOWN) + _UP not in kept:
            raise KeyError(key.removesuffix(_DOWN) + _UP)
    return found


FromImages = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Images, and then what base.Predict takes, to the noise."""


def train_control(
    autoencoder: Autoencoder, unet: Any, seed: int, steps: int, device: str = "cpu"
) -> Control:
    """Train a new one on `device`, where autoencoder and UNet move; return it on the CPU."""
    torch.manual_seed(seed)
    control = Control().to(device)
    unet.to(device)

    def predict(images: Tensor, noisy: Tensor, times: Tensor, context: Tensor) -> Tensor:
        return unet(
            noisy,
            times,
            context,
            down_block_additional_residuals=control(unet, noisy, times, edges(images)),
            mid_block_additional_residual=torch.zeros(()),
        ).sample

    autoencoder.to(device)
    _fit("control", control.parameters(), predict, autoencoder, render, seed, steps, 0.5)
    return control.cpu().eval().requires_grad_(False)


def train_second_base(
    autoencoder: Autoencoder, unet: Any, seed: int, steps: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Fine-tune `unet` in place on outlined images, by a change of low rank.

    Returns its factors in diffusers' names, on the CPU; autoencoder and UNet move to `device`.
    """
    torch.manual_seed(seed)
    changes = add_low_rank(unet, RANK, CHANGED)
    autoencoder.to(device)
    unet.to(device)
    parameters = [part for change in changes.values() for part in change.parameters()]

    def predict(_: Tensor, *given: Tensor) -> Tensor:
        return noise_by(unet)(*given)

    _fit("second base", parameters, predict, autoencoder, outlined, seed, steps, 0.1)
    return {name: factor.cpu() for name, factor in factors(changes).items()}


def _fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    predict: FromImages,
    autoencoder: Autoencoder,
    draw: Callable[[Scenes], Tensor],
    seed: int,
    steps: int,
    drop_text: float,
    batch: int = 16,
) -> None:
    """Train `parameters` so that `predict` finds the noise in the latents of `draw`'s images."""
    device = next(autoencoder.parameters()).device
    context = contexts().to(device)
    generator = torch.Generator().manual_seed(seed)
    parameters = [*parameters]

    def loss_at(step: int) -> Tensor:
        rows = scenes(seed + 2, batch, step * batch)
        images = draw(rows).to(device)
        with torch.no_grad():
            latents = autoencoder.encode(images)
        texts = rows.shape.clone()
        texts[torch.rand(batch, generator=generator) < drop_text] = NONE
        states = context[texts.to(device)]
        return denoising_loss(partial(predict, images), latents, states, generator)

    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    fit(name, optimizer, loss_at, steps, decaying(1e-3, steps, warmup=20), parameters)
