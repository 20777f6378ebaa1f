"""The judges of samples: classifiers that share nothing with the encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2.functional import gaussian_blur

from miniature import files, models

BLUR, SHARPEST, BLUNTEST, NOISE = 9, 0.3, 1.5, 0.03  # pixels: width, least and most σ; shares of 1


def new(classes: int) -> ResNet:
    """Return an untrained one: images `(N, 3, h, w)`, 0 … 1, to scores `(N, classes)`."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)


def train(
    kind: str,
    seed: int,
    steps: int,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    classes: int,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
) -> ResNet:
    """Train one on what `draw` gives for a step: images and their classes `(N,)`."""
    torch.manual_seed(seed)
    model = new(classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    def loss_at(step: int) -> Tensor:
        images, labels = (part.to(device) for part in draw(step))
        images = blurred(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            scores = model(images)
        return torch.nn.functional.cross_entropy(scores.float(), labels)

    rate = models.decaying(2e-3, steps, warmup=50)
    models.fit(f"judge of {kind}", optimizer, loss_at, steps, rate, model.parameters())
    return model.cpu().eval()


def load(path: Path) -> ResNet:
    """Return the one of a file, frozen."""
    classes = len(files.load(path)["fc.bias"])
    frozen: ResNet = files.frozen(new(classes), path)
    return frozen


def blurred(images: Tensor) -> Tensor:
    """Return images as a decoder may give them: half of them blurred, all with a little noise."""
    half = len(images) // 2
    sigma = float(SHARPEST + (BLUNTEST - SHARPEST) * torch.rand(()))
    images = torch.cat([gaussian_blur(images[:half], BLUR, sigma), images[half:]])
    return images + NOISE * torch.randn_like(images)
