"""What is measured on the miniature's pictures: likeness to a reference, and the judge's words."""

from __future__ import annotations

import math

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool2d

from tools.world import files, image_encoder
from tools.world.judge import Judge, ShapeClassifier, objects


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
    return float((found == wanted).float().mean())


def overlap(pictures: Tensor, covered: Tensor) -> float:
    """Mean intersection over union of the shapes in pictures `(N, 3, 64, 64)` with those that are
    asked for, `(N, 64, 64)` in 0 … 1."""
    found, wanted = objects(pictures), covered > 0.5
    union = (found | wanted).sum((1, 2)).clamp(min=1)
    return float(((found & wanted).sum((1, 2)) / union).mean())


def whiteness_of_outlines(pictures: Tensor, width: int = 3) -> float:
    """How white the outermost pixels of the shapes are: the mean of their darkest channel."""
    inside = objects(pictures).float()[:, None]
    inner = 1 - max_pool2d(1 - inside, 2 * width + 1, 1, width)
    rim = (inside - inner)[:, 0]
    darkest = pictures.amin(1)
    return float(((darkest * rim).sum((1, 2)) / rim.sum((1, 2)).clamp(min=1)).mean())


def chance_interval(chance: float, count: int) -> tuple[float, float]:
    """Where a share of `count` draws lies 99 times in 100 if only chance is at work."""
    spread = 2.58 * math.sqrt(chance * (1 - chance) / count)
    return max(0.0, chance - spread), min(1.0, chance + spread)
