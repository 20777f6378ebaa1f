"""Weights of the latents of a batch, typed as a list or as keyframes."""

from __future__ import annotations

import math
import re

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_KEYFRAME = re.compile(rf"(\d+)\s*[:=]\s*({NUMBER})", re.IGNORECASE)


def weights_of(text: str, count: int = 0) -> list[float]:
    """One weight a latent. "0, 0.5, 1": as they stand. "0: 0, 8: 1": weights of numbered latents,
    linear between them, constant before the first and after the last.

    `count`: how many latents; 0 for as many as the text names. Raises ValueError for what cannot be
    read, and for a text of other or further latents than `count`."""
    entries = [entry for entry in re.split(r"[,;\s]*[,;\n][,;\s]*", text.strip()) if entry]
    if not entries:
        raise ValueError("weights is empty; expected '0, 0.5, 1' or keyframes '0: 0, 8: 1'.")
    keyframes = [_KEYFRAME.fullmatch(entry) for entry in entries]
    if all(keyframes):
        points = {int(match[1]): float(match[2]) for match in keyframes if match}
        _check_finite(points.values(), text)
        last = max(points)
        if count and last >= count:
            raise ValueError(
                f"weights has a keyframe at latent {last}, but there are {count} latents, "
                f"numbered 0 … {count - 1}. Raise count, or move the keyframe."
            )
        return _between(points, count or last + 1)
    odd = next((entry for entry in entries if not re.fullmatch(NUMBER, entry, re.I)), None)
    if odd is not None:
        raise ValueError(
            f"weights has {odd!r}; expected numbers, '0, 0.5, 1', or keyframes only, '0: 0, 8: 1'."
        )
    weights = [float(entry) for entry in entries]
    _check_finite(weights, text)
    if count and len(weights) != count:
        raise ValueError(
            f"weights lists {len(weights)} numbers for {count} latents. Give one a latent, or "
            "keyframes such as '0: 0, 8: 1', or set count to 0."
        )
    return weights


def _check_finite(weights: object, text: str) -> None:
    if not all(map(math.isfinite, weights)):  # type: ignore[call-overload]
        raise ValueError(f"weights must be finite numbers; found {text!r}.")


def _between(points: dict[int, float], count: int) -> list[float]:
    frames = sorted(points)
    made = []
    for frame in range(count):
        before = max((f for f in frames if f <= frame), default=frames[0])
        after = min((f for f in frames if f >= frame), default=frames[-1])
        part = (frame - before) / (after - before) if after > before else 0.0
        made.append(points[before] + part * (points[after] - points[before]))
    return made
