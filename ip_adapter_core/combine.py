"""Several image prompts to one, on the encoder's features."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .image_prompt import ImageFeatures, ImagePrompt
from .latent_weights import plain
from .variants import FACE, FEATURE_KINDS

METHODS = ("concat", "average", "norm_average", "add", "subtract", "max", "min")


def parse_weights(text: str, count: int) -> list[float]:
    """Read "1, 0.5", a number for each of `count` prompts; all are 1 where the text is empty.

    Raises ValueError for another number of them, or for what is not a finite number.
    """
    if not text.strip():
        return [1.0] * count
    weights = []
    for position, entry in enumerate(plain(text).split(","), 1):
        try:
            weight = float(entry)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(
                f"weights holds {entry.strip()!r} in place {position}; expected a finite number. "
                'Separate numbers by commas, as in "1, 0.5".'
            )
        weights.append(weight)
    if len(weights) != count:
        raise ValueError(
            f"weights holds {len(weights)} numbers ({text.strip()}), but {count} image prompts "
            "are connected. Give each its own, in their order, or leave weights empty."
        )
    return weights


def combine(
    prompts: Mapping[str, ImagePrompt], method: str, weights: Sequence[float]
) -> ImagePrompt:
    """Make one prompt of several, given by the names that errors call them by, with weights wᵢ.

    `concat`: all images side by side, so that their numbers add up. The others go image by
    image, where prompts of one image stand beside each of N: `average` Σ wᵢ fᵢ / Σ wᵢ; `add`
    Σ wᵢ fᵢ; `subtract` w₀ f₀ − Σ wᵢ fᵢ of the others; `norm_average` the direction of the
    average of the directions, with the average of the lengths, for each vector of features; `max`,
    `min` the greatest or least wᵢ fᵢ, number by number.
    What stands against the images: with `concat` all of theirs, equal ones once; otherwise
    their average, weighted by |wᵢ|. The fingerprint is that of all prompts, empty where one has
    none.

    Raises ValueError for no prompts, another method, prompts of different encoders or numbers of
    images, and for weights that cannot be applied.
    """
    if not prompts:
        raise ValueError("No image prompt is connected; expected at least one.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if len(weights) != len(prompts):
        raise ValueError(f"Found {len(weights)} weights for {len(prompts)} image prompts.")
    _check_encoders(prompts)
    first = next(iter(prompts.values()))
    structures = {prompt.structure for prompt in prompts.values()}
    if len(structures) > 1:
        raise ValueError(
            f"Faces of the structures {_listed(sorted(structures))} cannot be one prompt. Encode "
            "them with one structure, or apply each with a node of its own."
        )
    images = {name: prompt.positive for name, prompt in prompts.items()}
    against = {name: prompt.negative for name, prompt in prompts.items()}
    if method == "concat":
        if any(weight != 1 for weight in weights):
            raise ValueError(
                f"concat shows every image as it is, so that its weights must all be 1; found "
                f"{_listed(weights)}. Leave weights empty, or choose another method."
            )
        positive = _each(torch.cat, list(images.values()))
        negative = _each(torch.cat, _distinct(list(against.values())))
    else:
        _check_numbers(images, method, "images")
        _check_numbers(against, method, "negative images")
        positive = _calculated(images, method, weights)
        negative = _average_negative(against, weights)
    known = all(prompt.fingerprint for prompt in prompts.values())
    fingerprint = first.fingerprint if known else ""
    one = ImagePrompt(positive, negative, first.encoder, fingerprint, first.structure)
    black = all(prompt.black is not None for prompt in prompts.values())
    return replace(one, black=first.black if black else None)


def _check_encoders(prompts: Mapping[str, ImagePrompt]) -> None:
    # Each with each: between two of unknown weights may stand two of known ones.
    for (name, one), (other_name, other) in itertools.combinations(prompts.items(), 2):
        if one.fingerprint and other.fingerprint:
            same = one.fingerprint == other.fingerprint
        else:
            same = one.encoder == other.encoder
        if not (same and _sizes(one) == _sizes(other)):
            raise ValueError(
                "Image prompts of different encoders cannot be combined: "
                f"{name} was made with {_named(one)}, {other_name} with {_named(other)}. "
                "Encode the images with one image encoder."
            )


def _sizes(prompt: ImagePrompt) -> list[torch.Size]:
    """Of one image's features."""
    return [prompt.positive.of(kind).shape[1:] for kind in (*FEATURE_KINDS, FACE)]


def _named(prompt: ImagePrompt) -> str:
    known = f"fingerprint {prompt.fingerprint[:12]}" if prompt.fingerprint else "no fingerprint"
    return f"{prompt.encoder}, {known}"


def _listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)


def _each(function: Callable[[list[Tensor]], Tensor], sides: list[ImageFeatures]) -> ImageFeatures:
    """Apply `function` to the tensors of one kind, for all kinds that there are."""
    kinds = [*FEATURE_KINDS, *([] if sides[0].face_embeds is None else [FACE])]
    return ImageFeatures(*(function([side.of(kind) for side in sides]) for kind in kinds))


def _equal(one: ImageFeatures, other: ImageFeatures) -> bool:
    kinds = (*FEATURE_KINDS, FACE)
    return all(torch.equal(one.of(kind), other.of(kind)) for kind in kinds)


def _distinct(sides: list[ImageFeatures]) -> list[ImageFeatures]:
    kept: list[ImageFeatures] = []
    for side in sides:
        if not any(_equal(side, other) for other in kept):
            kept.append(side)
    return kept


def _average_negative(
    sides: Mapping[str, ImageFeatures], weights: Sequence[float]
) -> ImageFeatures:
    distinct = _distinct(list(sides.values()))
    if len(distinct) == 1:
        return distinct[0]  # to the bit, whatever the weights
    absolute = [abs(weight) for weight in weights]
    if not any(absolute):
        absolute = [1.0] * len(absolute)
    return _calculated(sides, "average", absolute)


def _check_numbers(sides: Mapping[str, ImageFeatures], method: str, what: str) -> None:
    numbers = {name: len(side) for name, side in sides.items()}
    if len({n for n in numbers.values() if n != 1}) > 1:
        found = ", ".join(f"{n} in {name}" for name, n in numbers.items())
        raise ValueError(
            f"{method} goes image by image, but found {what} of different numbers: {found}. "
            "Expected equal numbers, or one image; concat takes any."
        )


def _calculated(
    sides: Mapping[str, ImageFeatures], method: str, weights: Sequence[float]
) -> ImageFeatures:
    total = math.fsum(weights)
    # Not exactly 0: 0.1 + 0.2 − 0.3 is not.
    if "average" in method and abs(total) <= 1e-9 * sum(map(abs, weights)):
        raise ValueError(
            f"{method} divides by the sum of weights, which is 0 for {_listed(weights)}. Choose "
            "weights of another sum, or add or subtract."
        )

    def calculate(features: list[Tensor]) -> Tensor:
        exact = [x.double() for x in features]  # rounded once, at the end
        if method == "norm_average":
            result = _norm_average(exact, weights)
        elif method in ("max", "min"):
            scaled = [weight * x for weight, x in zip(weights, exact, strict=True)]
            result = functools.reduce(getattr(torch, f"{method}imum"), scaled)
        elif method == "subtract":
            result = _sum(exact, [weights[0], *(-weight for weight in weights[1:])])
        else:
            result = _sum(exact, weights) / (total if method == "average" else 1)
        result = result.to(features[0].dtype)
        if not result.isfinite().all():
            raise ValueError(
                f"{method} with weights {_listed(weights)} leaves the range of numbers. Choose "
                "smaller weights."
            )
        return result

    return _each(calculate, list(sides.values()))


def _sum(features: list[Tensor], weights: Sequence[float]) -> Tensor:
    first, *others = (weight * x for weight, x in zip(weights, features, strict=True))
    for other in others:
        first = first + other
    return first


def _norm_average(features: list[Tensor], weights: Sequence[float]) -> Tensor:
    """Of vectors along the last axis; zero vectors have no direction, and count with length 0."""
    lengths = [x.norm(dim=-1, keepdim=True) for x in features]
    directions = [_unit(x, length) for x, length in zip(features, lengths, strict=True)]
    total = math.fsum(weights)
    direction = _sum(directions, weights) / total
    direction = _unit(direction, direction.norm(dim=-1, keepdim=True))
    return direction * (_sum(lengths, weights) / total)


def _unit(vectors: Tensor, lengths: Tensor) -> Tensor:
    return vectors / lengths.where(lengths > 0, torch.ones_like(lengths))
