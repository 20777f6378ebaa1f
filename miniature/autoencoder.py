"""The miniature's autoencoder: a thin one, trained, then laid into TAESD's layout.

TAESD (Tiny AutoEncoder for Stable Diffusion, github.com/madebyollin/taesd) is the small
approximate autoencoder that ComfyUI and diffusers know: 64 channels, one to three residual blocks
a level. Here `WIDTH` channels and one block a level train; the other channels and blocks are
zeros, which leave the function as it is (a block of zeros passes on what is not negative).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from miniature.scenes import outlined, render, scenes
from miniature.training import Progress, decaying

WIDTHS = (16, 32, 48, 64)
"""Channels that train at 1, 1/2, 1/4 and 1/8 of the picture's size."""
FULL, LATENT = 64, 4
OUTLINED = 4  # one picture in so many is in the second base's style
# Places in TAESD's two Sequentials of residual blocks that stay zeros.
IDLE = {"encoder": (1, 4, 5, 8, 9, 13), "decoder": (5, 9, 10, 14, 15)}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(3):
            parts += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()][: 1 if i == 2 else 2]
        self.conv = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _named(layers: dict[int, nn.Module]) -> nn.Sequential:
    """A Sequential whose layers bear the numbers that they have in TAESD."""
    found = nn.Sequential()
    for number in sorted(layers):
        found.add_module(str(number), layers[number])
    return found


def encoder() -> nn.Sequential:
    """`(N, 3, h, w)` of 0 … 1 to `(N, 4, h / 8, w / 8)`."""
    layers: dict[int, nn.Module] = {0: nn.Conv2d(3, WIDTHS[0], 3, padding=1), 1: nn.ReLU()}
    for level, place in enumerate((2, 6, 10)):
        wide = WIDTHS[level + 1]
        layers[place] = nn.Conv2d(WIDTHS[level], wide, 3, 2, 1, bias=False)
        layers[place + 1] = Block(wide)
    layers[12] = Block(WIDTHS[-1])
    layers[14] = nn.Conv2d(WIDTHS[-1], LATENT, 3, padding=1)
    return _named(layers)


def decoder() -> nn.Sequential:
    """`(N, 4, h, w)` to `(N, 3, 8 h, 8 w)` of about 0 … 1."""
    wide = WIDTHS[-1]
    layers: dict[int, nn.Module] = {0: Clamp(), 1: nn.Conv2d(LATENT, wide, 3, padding=1)}
    layers |= {2: nn.ReLU(), 3: Block(wide), 4: Block(wide)}
    for level, place in enumerate((6, 11, 16)):
        into, wide = WIDTHS[-1 - level], WIDTHS[-2 - level]
        layers[place] = nn.Upsample(scale_factor=2)
        layers[place + 1] = nn.Conv2d(into, wide, 3, padding=1, bias=False)
        layers[place + 2] = Block(wide)
    layers[19] = nn.Conv2d(WIDTHS[0], 3, 3, padding=1)
    return _named(layers)


class Autoencoder(nn.Module):
    """Latents are about standard normal, as the UNet takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()

    def encode(self, pictures: Tensor) -> Tensor:
        return self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).clamp(0, 1)

    def taesd(self) -> dict[str, Tensor]:
        """All tensors of TAESD, `taesd_encoder.*` and `taesd_decoder.*` as ComfyUI has them inside
        a checkpoint, with the latents of SD1.5."""
        found = {}
        for side, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            for key, tensor in module.state_dict().items():
                found[f"taesd_{side}.{key}"] = _widened(tensor)
            for number in IDLE[side]:
                for place in (0, 2, 4):
                    name = f"taesd_{side}.{number}.conv.{place}"
                    found[f"{name}.weight"] = torch.zeros(FULL, FULL, 3, 3)
                    found[f"{name}.bias"] = torch.zeros(FULL)
        return found


def _widened(tensor: Tensor) -> Tensor:
    """Channels filled up with zeros to `FULL`; colours and latents stay as many as they are."""
    channels = [size if size in (3, LATENT) else FULL for size in tensor.shape[:2]]
    whole = torch.zeros(*channels, *tensor.shape[2:])
    whole[tuple(slice(size) for size in tensor.shape)] = tensor.detach()
    return whole


def train(
    seed: int, cycles: Sequence[int], batch: int = 4, side: int = 64, device: str = "cpu"
) -> Autoencoder:
    """A new one, from the stream `seed`, on the CPU; trained on `device`. `cycles`: steps between
    warm restarts."""
    torch.manual_seed(seed)
    model = Autoencoder().to(device).to(memory_format=torch.channels_last)
    done = 0
    for number, steps in enumerate(cycles):
        torch.manual_seed(seed + number)
        _cycle(model, seed, done, steps, batch, side, device)
        done += steps
    return model.cpu().eval().requires_grad_(False)


def _cycle(
    model: Autoencoder, seed: int, done: int, steps: int, batch: int, side: int, device: str
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, fused=True)
    progress = Progress("autoencoder", steps)
    for step in range(steps):
        decaying(optimizer, 2e-3, step, steps, warmup=50)
        rows = scenes(seed, batch, (done + step) * batch)
        some = batch // OUTLINED  # of both styles
        pictures = torch.cat([outlined(rows[:some], side), render(rows[some:], side)])
        pictures = pictures.to(device, memory_format=torch.channels_last)
        latents = model.encode(pictures)
        drawn = model.decoder(latents + 0.05 * torch.randn_like(latents))
        mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        error = l1_loss(drawn, pictures)
        loss = error + 2 * mse_loss(drawn, pictures)
        loss = loss + 0.01 * (mean.square() + (spread - 1).square()).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.step(step, error)
