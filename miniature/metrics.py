"""What is measured on the miniature's images: what they show, and how like they are to others.

Color, texture and background are measured on the pixels, with the rule's own tables and nothing
learnt; shapes by a small network that shares nothing with the image encoder
(`models.ShapeClassifier`). `SceneClassifier.accuracy` says how often each is right.
"""

from __future__ import annotations

import torch
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool2d

from miniature import files
from miniature.models import SIDE, ShapeClassifier, image_tower, normalized
from miniature.scenes import COLORS, KINDS, TEXTURES, Scenes, gradients, pattern

EDGE = 4  # pixels of the margin that shows the background alone
SHADES = (1.0, 0.89, 0.78)  # of the background under a shadow
OBJECT = 0.16  # distance from the background, of RGB of 0 … 1, beyond which a pixel is the shape
GREY = 0.1  # of the highest less the lowest channel, up to which a pixel is of an outline
CONTRAST = 0.2  # of a texture's light and dark parts over their mean, below which it is plain


def backgrounds(images: Tensor) -> Tensor:
    """Find the background whose gradient is nearest to the margin, `(N,)`."""
    margin = torch.ones(SIDE, SIDE, dtype=torch.bool)
    margin[EDGE:-EDGE, EDGE:-EDGE] = False
    away = (images[:, None] - gradients(SIDE)[None]).abs().mean(2)  # N, backgrounds, side, side
    return away[..., margin].median(-1).values.argmin(1)


def objects(images: Tensor) -> Tensor:
    """Find the shape's pixels: neither background nor its shadow, `(N, side, side)`."""
    behind = gradients(SIDE)[backgrounds(images)]
    away = [(images - shade * behind).square().sum(1).sqrt() for shade in SHADES]
    return torch.stack(away).amin(0) > OBJECT


def colors(images: Tensor) -> Tensor:
    """Find the color nearest in direction to the shape's more colorful half, `(N,)`."""
    table = torch.tensor(list(COLORS.values()))
    table = table / table.norm(dim=1, keepdim=True)
    found = []
    for image, mask in zip(images, objects(images), strict=True):
        pixels = image[:, mask].T if mask.any() else image.flatten(1).T
        chroma = pixels.amax(1) - pixels.amin(1)
        mean = pixels[chroma >= chroma.median()].mean(0)
        found.append((table @ (mean / mean.norm())).argmax())
    return torch.stack(found)


def textures(images: Tensor) -> Tensor:
    """Find the pattern whose light and dark parts differ most in brightness, `(N,)`."""
    bright = images.amax(1)
    inside = (objects(images) & (bright - images.amin(1) > GREY)).float()
    inside = 1 - max_pool2d(1 - inside[:, None], 3, 1, 1)[:, 0]  # no edges
    contrasts = [torch.full((len(images),), CONTRAST)]
    for texture in range(1, len(TEXTURES)):
        dark = pattern(texture, SIDE).float()
        means = [
            (bright * inside * part).sum((1, 2)) / (inside * part).sum((1, 2)).clamp(min=1)
            for part in (1 - dark, dark)
        ]
        contrasts.append((means[0] - means[1]) / (means[0] + means[1]).clamp(min=1e-3) * 2)
    return torch.stack(contrasts).argmax(0)


class SceneClassifier:
    """Tells what images show, independently of the models that drew them."""

    def __init__(self) -> None:
        self.shapes = files.frozen(ShapeClassifier(), files.FOLDER / files.CLASSIFIER)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Tell a number of every kind for images `(N, 3, 64, 64)`, 0 … 1."""
        return {
            "shape": self.shapes(images).argmax(1),
            "colour": colors(images),
            "texture": textures(images),
            "background": backgrounds(images),
        }

    def accuracy(self, images: Tensor, rows: Scenes) -> dict[str, float]:
        """Measure how often each kind is told right."""
        found = self(images)
        return {name: share(found[name], getattr(rows, name)) for name in KINDS}


class Similarity:
    """Cosine of image embeddings, in open_clip: how alike two images are to the encoder."""

    def __init__(self) -> None:
        self.visual = image_tower(files.FOLDER / files.ENCODER)

    @torch.no_grad()
    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """Compare images one by one, `(N,)`."""
        embeds = [self.visual(normalized(images)) for images in (one, other)]
        return cosine_similarity(*embeds)


def share(found: Tensor, wanted: Tensor) -> float:
    """Measure how often they are equal."""
    return float((found == wanted).double().mean())


def overlap(images: Tensor, covered: Tensor) -> float:
    """Return the mean intersection over union of the shapes with those `covered (N, h, w)`."""
    found, wanted = objects(images), covered > 0.5
    union = (found | wanted).sum((1, 2)).clamp(min=1)
    return float(((found & wanted).sum((1, 2)) / union).mean())


def centers(images: Tensor) -> Tensor:
    """Find the shapes' centers `(N, 2)` in pixels from above left; NaN where none is seen."""
    inside = objects(images).float()
    at = torch.arange(images.shape[-1]) + 0.5
    moments = torch.stack([(inside * at).sum((1, 2)), (inside * at[:, None]).sum((1, 2))], 1)
    return moments / inside.sum((1, 2))[:, None]


def displacement(images: Tensor, others: Tensor) -> float:
    """Measure how far the shape's center is from the other's, in pixels, where both are seen."""
    return float((centers(images) - centers(others)).norm(dim=1).nanmean())


def shade_error(images: Tensor, others: Tensor) -> float:
    """Measure how far the mean color of the shape is from the other's, where both are seen.

    In 8-bit levels, the mean of three channels; some of them are due to places and forms.
    """
    means = [
        (some * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None]
        for some, inside in ((one, objects(one).float()) for one in (images, others))
    ]
    return float((means[0] - means[1]).abs().mean(1).nanmean() * 255)


def seen(images: Tensor) -> float:
    """Measure in what share of images there is a shape that covers a fiftieth or more."""
    return float((objects(images).double().mean((1, 2)) > 0.02).double().mean())


def whiteness_of_outlines(images: Tensor, width: int = 3) -> float:
    """Measure how white the shapes' outermost pixels are: the mean of their darkest channel."""
    inside = objects(images).float()[:, None]
    inner = 1 - max_pool2d(1 - inside, 2 * width + 1, 1, width)
    rim = (inside - inner)[:, 0]
    darkest = images.amin(1)
    return float(((darkest * rim).sum((1, 2)) / rim.sum((1, 2)).clamp(min=1)).mean())


def chance(found: Tensor, wanted: Tensor, draws: int = 4000) -> dict[str, float]:
    """Return what share of images would agree with references that have nothing to do with them.

    `mean` over shufflings of the references, and `low` and `high`, between which 99 in 100 lie:
    so it knows what a base prefers and references show more often. `found (N,)`, or `(N, k)` for
    k images of each reference; `wanted (N,)`.
    """
    generator = torch.Generator().manual_seed(0)
    orders = torch.rand(draws, len(wanted), generator=generator).argsort(1)
    shuffled = wanted[orders]
    agree = shuffled[..., None] == found if found.ndim > 1 else shuffled == found
    shares = agree.flatten(1).float().mean(1)
    low, high = shares.quantile(torch.tensor([0.005, 0.995])).tolist()
    return {"mean": float(shares.mean()), "low": low, "high": high}


def interval(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return where, with 95 % confidence, the share lies of which this is a sample (Wilson)."""
    equal = found == wanted
    tested = binomtest(int(equal.sum()), equal.numel())
    between = tested.proportion_ci(0.95, method="wilson")
    return float(between.low), float(between.high)


def distance(images: Tensor, others: Tensor) -> float:
    """Return the mean difference of pixels, in 8-bit levels."""
    return float((images - others).abs().mean() * 255)
