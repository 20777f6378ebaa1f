"""An independent judge of the miniature's pictures: pixel statistics, and a classifier of shapes.

Colour, texture and background are measured on the pixels, with the rule's own tables and nothing
learnt. Shapes are told by a small convolutional network that is trained on the set alone and shares
nothing with the image encoder. `accuracy` says how often each is right on pictures whose kinds are
known.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2.functional import gaussian_blur

from miniature.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    TEXTURES,
    Scenes,
    outlined,
    pattern,
    render,
    scenes,
)
from miniature.training import Progress, decaying

SIDE = 64
EDGE = 4  # pixels of the margin that shows the background alone
SHADES = (1.0, 0.89, 0.78)  # of the background under a shadow
OBJECT = 0.16  # distance from the background, of RGB of 0 … 1, beyond which a pixel is the shape
OUTLINED = 4  # one in so many of the classifier's pictures is in the second base's style
SHARPEST, BLUNTEST, BLUR = 0.5, 3.0, 15  # pixels: σ of what blurs the classifier's pictures, width
GREY = 0.1  # of the highest less the lowest channel, up to which a pixel is of an outline
CONTRAST = 0.2  # of a texture's light and dark parts over their mean, below which it is plain


def backgrounds(pictures: Tensor) -> Tensor:
    """The background whose gradient is nearest to the margin, `(N,)`."""
    margin = torch.ones(SIDE, SIDE, dtype=torch.bool)
    margin[EDGE:-EDGE, EDGE:-EDGE] = False
    away = (pictures[:, None] - _gradients()[None]).abs().mean(2)  # N, backgrounds, side, side
    return away[..., margin].median(-1).values.argmin(1)


def objects(pictures: Tensor) -> Tensor:
    """Which pixels are the shape's: neither background nor its shadow, `(N, side, side)`."""
    behind = _gradients()[backgrounds(pictures)]
    away = [(pictures - shade * behind).square().sum(1).sqrt() for shade in SHADES]
    return torch.stack(away).amin(0) > OBJECT


def colours(pictures: Tensor) -> Tensor:
    """The colour nearest in direction to the more colourful half of the shape's pixels, `(N,)`."""
    table = torch.tensor(list(COLOURS.values()))
    table = table / table.norm(dim=1, keepdim=True)
    found = []
    for picture, mask in zip(pictures, objects(pictures), strict=True):
        pixels = picture[:, mask].T if mask.any() else picture.flatten(1).T
        chroma = pixels.amax(1) - pixels.amin(1)
        mean = pixels[chroma >= chroma.median()].mean(0)
        found.append((table @ (mean / mean.norm())).argmax())
    return torch.stack(found)


def textures(pictures: Tensor) -> Tensor:
    """The pattern whose light and dark parts differ most in the shape's brightness, `(N,)`."""
    bright = pictures.amax(1)
    inside = (objects(pictures) & (bright - pictures.amin(1) > GREY)).float()
    inside = 1 - torch.nn.functional.max_pool2d(1 - inside[:, None], 3, 1, 1)[:, 0]  # no edges
    contrasts = [torch.full((len(pictures),), CONTRAST)]
    for texture in range(1, len(TEXTURES)):
        dark = pattern(texture, SIDE).float()
        means = [
            (bright * inside * part).sum((1, 2)) / (inside * part).sum((1, 2)).clamp(min=1)
            for part in (1 - dark, dark)
        ]
        contrasts.append((means[0] - means[1]) / (means[0] + means[1]).clamp(min=1e-3) * 2)
    return torch.stack(contrasts).argmax(0)


def _gradients() -> Tensor:
    """Every background alone, `(backgrounds, 3, side, side)`."""
    ends = torch.tensor(list(BACKGROUNDS.values()))
    fade = torch.linspace(0, 1, SIDE)[:, None]
    gradients = ends[:, 0, :, None, None] * (1 - fade) + ends[:, 1, :, None, None] * fade
    return gradients.expand(-1, -1, -1, SIDE)


class ShapeClassifier(nn.Sequential):
    """Pictures `(N, 3, 64, 64)`, 0 … 1, to a score of each shape."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        widths = (3, 16, 32, 64, 64)
        for into, out in itertools.pairwise(widths):
            layers += [nn.Conv2d(into, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 16, len(SHAPES)))


def train(seed: int, steps: int, batch: int = 64, device: str = "cpu") -> ShapeClassifier:
    """A new one, from the stream `seed`, on the CPU; trained on `device`. Half of its pictures are
    blurred, more or less, and all are noisy, as those that a decoder draws may be; some have the
    second base's outlines."""
    torch.manual_seed(seed)
    model = ShapeClassifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    progress = Progress("shape classifier", steps)
    for step in range(steps):
        decaying(optimizer, 2e-3, step, steps, warmup=20)
        rows = scenes(seed, batch, step * batch)
        pictures, half = render(rows, SIDE), batch // 2
        pictures[::OUTLINED] = outlined(rows[::OUTLINED], SIDE)
        pictures = pictures.to(device)
        sigma = float(SHARPEST + (BLUNTEST - SHARPEST) * torch.rand(()))
        blurred = gaussian_blur(pictures[:half], BLUR, sigma)
        pictures = torch.cat([blurred, pictures[half:]]) + 0.04 * torch.randn_like(pictures)
        loss = cross_entropy(model(pictures), rows.shape.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.step(step, loss)
    return model.cpu().eval().requires_grad_(False)


class Judge:
    """`classifier`: of shapes."""

    def __init__(self, classifier: ShapeClassifier) -> None:
        self.classifier = classifier

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        """What is to be seen in pictures `(N, 3, 64, 64)`, 0 … 1: a number each of every kind."""
        return {
            "shape": self.classifier(pictures).argmax(1),
            "colour": colours(pictures),
            "texture": textures(pictures),
            "background": backgrounds(pictures),
        }

    def accuracy(self, pictures: Tensor, rows: Scenes) -> dict[str, float]:
        """How often each kind is told right."""
        found = self(pictures)
        return {name: float((found[name] == getattr(rows, name)).float().mean()) for name in KINDS}
