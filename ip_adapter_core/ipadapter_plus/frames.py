"""Weights over the frames of an animation, and the pictures that go with them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

TIMINGS = ("custom", "linear", "ease_in_out", "ease_in", "ease_out", "random")
ORDERS = ("full batch", "shift batches", "alternate batches")


@dataclass(frozen=True)
class Strategy:
    """Inputs of *IPAdapter Weights*; `frame_count` pictures. A mapping on its socket."""

    weights: str = ""
    timing: str = "custom"
    frames: int = 0
    start_frame: int = 0
    end_frame: int = 9999
    add_starting_frames: int = 0
    add_ending_frames: int = 0
    method: str = "full batch"
    frame_count: int = 0

    def mapping(self) -> dict[str, Any]:
        return asdict(self)


def weights_over(strategy: Strategy, image: Tensor | None) -> tuple[list[float], Any, Any]:
    """Return a weight for each frame, and the pictures that they fade between.

    Raises ValueError for text that holds no numbers.
    """
    once = _once(strategy)
    weights, one, other = once, None, None
    if image is not None:
        weights, one, other = _with_pictures(once, image, strategy.method)
        before, after = strategy.add_starting_frames, strategy.add_ending_frames
        weights = [weights[0]] * before + weights + [weights[-1]] * after
        one, other = (
            None
            if part is None
            else torch.cat(
                [image[:1].expand(before, -1, -1, -1), part, image[-1:].expand(after, -1, -1, -1)]
            )
            for part in (one, other)
        )
    return weights, one, other


def _once(strategy: Strategy) -> list[float]:
    """Return the weights of one run over the frames."""
    given = _numbers(strategy.weights)
    if strategy.timing == "custom":
        return given or [0.0]
    start, end = (given[0], given[-1]) if given else (0.0, 1.0)
    frames = max(strategy.frames, 2)
    last = min(strategy.end_frame, frames)
    duration = max(0, last - strategy.start_frame)
    between = [
        start + (end - start) * _eased(strategy.timing, i / max(1, duration - 1))
        for i in range(duration)
    ]
    weights = [start] * strategy.start_frame + between
    if weights and strategy.timing != "random":
        weights[-1] = end
    return (weights + [end] * (frames - last)) or [0.0]


def _eased(timing: str, part: float) -> float:
    if timing == "random":
        return random.uniform(0, 1)
    curves = {
        "ease_in_out": (1 - math.cos(part * math.pi)) / 2,
        "ease_in": math.sin(part * math.pi / 2),  # slows down at the end, as it always did
        "ease_out": 1 - math.cos(part * math.pi / 2),
    }
    return curves.get(timing, part)


def _numbers(text: str) -> list[float]:
    numbers = []
    for entry in filter(str.strip, text.replace("\n", ",").split(",")):
        try:
            numbers.append(float(entry))
        except ValueError as error:
            raise ValueError(
                f"weights has {entry.strip()!r}; expected numbers, separated by commas or lines."
            ) from error
    return numbers


def _with_pictures(
    once: Sequence[float], image: Tensor, method: str
) -> tuple[list[float], Tensor, Tensor | None]:
    frames, count = len(once), len(image)
    if "shift" in method and count > 1:
        one, other = image[:-1], image[1:]
        weights = [*once] * len(one)
    elif "alternate" in method and count > 1:
        one = image[::2].repeat_interleave(2, 0)[1:]
        other = image[1::2].repeat_interleave(2, 0)
        low, high = min(once), max(once)
        there_and_back = [*once, *(high - (weight - low) for weight in once)]
        weights = there_and_back * (len(one) // 2)
        if count % 2:
            one = one[:-1]
        else:
            other = other[:-1]
            weights += once
    else:
        return [*once] * count, image.repeat_interleave(frames, 0), None
    return weights, one.repeat_interleave(frames, 0), other.repeat_interleave(frames, 0)


def prompt_schedule(strategy: Strategy, prompt: str) -> str:
    """Return a line of text for each picture, by the frame at which it begins."""
    texts = [line for line in prompt.split("\n") if line.strip()]
    count, first = strategy.frame_count, strategy.add_starting_frames
    if not texts or not count:
        return ""
    texts = [texts[min(i, len(texts) - 1)] for i in range(count)]
    places = [(first + i * strategy.frames, text) for i, text in enumerate(texts)]
    if first > 0:
        places.insert(0, (0, texts[0]))
    if strategy.add_ending_frames > 0:
        places.append((first + count * strategy.frames, texts[-1]))
    return "".join(f'"{frame}": "{text}",\n' for frame, text in places)
