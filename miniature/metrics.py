"""What is measured on the miniature's pictures: likeness to a reference, and the judge's words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool2d

from miniature import files, image_encoder
from miniature.classifier import Judge, ShapeClassifier, objects


class Similarity:
    """Cosine of image embeddings, in open_clip: how alike two pictures are to the encoder."""

    def __init__(self) -> None:
        self.visual = image_encoder.tower(files.FOLDER / files.ENCODER)

    @torch.no_grad()
    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """`(N,)`"""
        embeds = [self.visual(image_encoder.normalised(pictures)) for pictures in (one, other)]
        return cosine_similarity(*embeds)


def judge() -> Judge:
    """With the shipped classifier of shapes."""
    classifier = ShapeClassifier()
    state = load_file(files.FOLDER / files.JUDGE)
    classifier.load_state_dict(
        {k: x.float() if x.is_floating_point() else x for k, x in state.items()}
    )
    return Judge(classifier.eval().requires_grad_(False))


def share(found: Tensor, wanted: Tensor) -> float:
    """How often they are equal."""
    return float((found == wanted).double().mean())


def overlap(pictures: Tensor, covered: Tensor) -> float:
    """Mean intersection over union of the shapes in pictures `(N, 3, 64, 64)` with those that are
    asked for, `(N, 64, 64)` in 0 … 1."""
    found, wanted = objects(pictures), covered > 0.5
    union = (found | wanted).sum((1, 2)).clamp(min=1)
    return float(((found & wanted).sum((1, 2)) / union).mean())


def centres(pictures: Tensor) -> Tensor:
    """Of the shapes, `(N, 2)`, in pixels from the corner above left; NaN where none is seen."""
    inside = objects(pictures).float()
    at = torch.arange(pictures.shape[-1]) + 0.5
    moments = torch.stack([(inside * at).sum((1, 2)), (inside * at[:, None]).sum((1, 2))], 1)
    return moments / inside.sum((1, 2))[:, None]


def displacement(pictures: Tensor, others: Tensor) -> float:
    """How far the shape's centre is from the other's on average, in pixels, where both are seen;
    `seen` says in how many."""
    return float((centres(pictures) - centres(others)).norm(dim=1).nanmean())


def shade_error(pictures: Tensor, others: Tensor) -> float:
    """How far the mean colour of the shape is from that of the other's: in 8-bit levels, the mean
    of three channels, where both are seen. Nearly whatever their places and forms: how much of a
    texture's dark part a shape covers, and that light falls from above, are some levels of it."""
    means = [
        (some * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None]
        for some, inside in ((one, objects(one).float()) for one in (pictures, others))
    ]
    return float((means[0] - means[1]).abs().mean(1).nanmean() * 255)


def seen(pictures: Tensor) -> float:
    """In how many of the pictures there is a shape that covers a fiftieth or more."""
    return float((objects(pictures).double().mean((1, 2)) > 0.02).double().mean())


def whiteness_of_outlines(pictures: Tensor, width: int = 3) -> float:
    """How white the outermost pixels of the shapes are: the mean of their darkest channel."""
    inside = objects(pictures).float()[:, None]
    inner = 1 - max_pool2d(1 - inside, 2 * width + 1, 1, width)
    rim = (inside - inner)[:, 0]
    darkest = pictures.amin(1)
    return float(((darkest * rim).sum((1, 2)) / rim.sum((1, 2)).clamp(min=1)).mean())


@dataclass(frozen=True)
class Chance:
    """What share of pictures would agree with references that have nothing to do with them."""

    mean: float
    low: float
    high: float


def chance(found: Tensor, wanted: Tensor, draws: int = 4000) -> Chance:
    """Of what was found in pictures, `(N,)` or `(N, k)` for k of each reference, and what was
    wanted, `(N,)`: the mean share over shufflings of the references, and where 99 in 100 of them
    lie. Unlike one over the number of kinds it knows that a base prefers some kinds and that
    references show some more often."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.rand(draws, len(wanted), generator=generator).argsort(1)
    shuffled = wanted[orders]
    agree = shuffled[..., None] == found if found.ndim > 1 else shuffled == found
    shares = agree.flatten(1).float().mean(1)
    low, high = shares.quantile(torch.tensor([0.005, 0.995])).tolist()
    return Chance(float(shares.mean()), low, high)


def interval(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Where, with 95 % confidence, the share lies of which these pictures are a sample (Wilson)."""
    equal = found == wanted
    tested = binomtest(int(equal.sum()), equal.numel())
    between = tested.proportion_ci(0.95, method="wilson")
    return float(between.low), float(between.high)


def distance(pictures: Tensor, others: Tensor) -> float:
    """Mean difference of pixels, in 8-bit levels."""
    return float((pictures - others).abs().mean() * 255)
