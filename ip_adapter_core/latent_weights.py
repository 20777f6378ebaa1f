"""Weights of the latents of a batch, typed as a list or as keyframes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MOST = 100_000  # latents
LIMITS = (-5.0, 5.0)  # those of λ itself
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_KEYFRAME = re.compile(rf"(\d+)\s*[:=]\s*({NUMBER})", re.IGNORECASE)


def plain(text: str) -> str:
    """Put ASCII's punctuation and digits in place of the wide ones that CJK keyboards type."""
    return unicodedata.normalize("NFKC", text).replace("、", ",")


def weights_of(
    text: str, count: int = 0, name: str = "weights", limits: tuple[float, float] = LIMITS
) -> list[float]:
    """Read one weight a latent.

    "0, 0.5, 1": as they stand. "0: 0, 8: 1": weights of numbered latents, linear between them,
    constant before the first and after the last.

    Args:
        text: The weights.
        count: How many latents; 0 for as many as the text names.
        name: The input's, for messages.
        limits: Least and greatest weight.

    Raises:
        ValueError: The text cannot be read, a weight lies outside `limits`, or the text is of other
            or further latents than `count` or MOST.
    """
    entries = [e for e in re.split(r"[,;\s]*[,;\n][,;\s]*", plain(text).strip()) if e]
    if not entries:
        raise ValueError(f"{name} is empty; expected '0, 0.5, 1' or keyframes '0: 0, 8: 1'.")
    keyframes = [(m[1], m[2]) for m in map(_KEYFRAME.fullmatch, entries) if m]
    if len(keyframes) < len(entries):
        weights = _listed(entries, count, name)
        _check_range(weights, name, limits)
        return weights
    points = _points(keyframes, count, name)
    _check_range(points.values(), name, limits)
    return _between(points, count or max(points) + 1)


def _listed(entries: list[str], count: int, name: str) -> list[float]:
    odd = next((entry for entry in entries if not re.fullmatch(NUMBER, entry, re.I)), None)
    if odd is not None:
        raise ValueError(
            f"{name} has {odd!r}; expected numbers, '0, 0.5, 1', or keyframes only, '0: 0, 8: 1'."
        )
    if count and len(entries) != count:
        raise ValueError(
            f"{name} lists {len(entries)} numbers for {count} latents. Give one a latent, or "
            "keyframes such as '0: 0, 8: 1', or set count to 0."
        )
    return [float(entry) for entry in entries]


def _points(keyframes: list[tuple[str, str]], count: int, name: str) -> dict[int, float]:
    points: dict[int, float] = {}
    for latent, weight in ((int(number), float(weight)) for number, weight in keyframes):
        if latent in points:
            raise ValueError(
                f"{name} has two keyframes at latent {latent}: {points[latent]:g} and {weight:g}. "
                "Keep one."
            )
        points[latent] = weight
    last, latents = max(points), count or MOST
    if last >= latents:
        raise ValueError(
            f"{name} has a keyframe at latent {last}, but there are {latents} latents"
            f"{'' if count else ' at most'}, numbered 0 … {latents - 1}. "
            f"{'Raise count, or move' if count else 'Move'} the keyframe."
        )
    return points


def _check_range(weights: Iterable[float], name: str, limits: tuple[float, float]) -> None:
    low, high = limits
    odd = next((weight for weight in weights if not low <= weight <= high), None)
    if odd is not None:
        raise ValueError(
            f"{name} has {odd:g}; expected {low:g} … {high:g}. (Decimals are written with a point: "
            "0.25.)"
        )


def _between(points: dict[int, float], count: int) -> list[float]:
    frames = sorted(points)
    weights = []
    for frame in range(count):
        before = max((f for f in frames if f <= frame), default=frames[0])
        after = min((f for f in frames if f >= frame), default=frames[-1])
        part = (frame - before) / (after - before) if after > before else 0.0
        weights.append(points[before] + part * (points[after] - points[before]))
    return weights
