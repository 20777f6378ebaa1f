"""When an image prompt acts, and how strongly, as the steps go by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Curve: TypeAlias = Callable[[float], float]
"""A fraction of the schedule, 0 … 1, to a multiplier of λ."""

_GRID = 1000  # SD's training timesteps: between two of them log σ is linear


@dataclass(frozen=True, eq=False)
class Schedule:
    """The window `start … end`, fractions of the schedule, and a curve of λ over all of it."""

    start: float = 0.0
    end: float = 1.0
    curve: Curve | None = None

    def prepare(self, model_sampling: Any) -> PreparedSchedule:
        """In the sigmas of the model that is sampled."""
        return PreparedSchedule(
            changing=self.start > 0 or self.end < 1 or self.curve is not None,
            sigma_start=float(model_sampling.percent_to_sigma(self.start)),
            sigma_end=float(model_sampling.percent_to_sigma(self.end)),
            curve=None if self.curve is None else _over_sigmas(self.curve, model_sampling),
        )


@dataclass(frozen=True, eq=False)
class PreparedSchedule:
    """`changing`: whether it is worth asking for the sigma at all. `curve` is over sigmas."""

    changing: bool
    sigma_start: float
    sigma_end: float
    curve: Curve | None

    def factor(self, sigma: float) -> float:
        """The multiplier of λ at this sigma, 0 outside the window. As in the host's own ranges
        both ends belong to the window."""
        if not self.sigma_end <= sigma <= self.sigma_start:
            return 0.0
        return 1.0 if self.curve is None else self.curve(sigma)


def _over_sigmas(curve: Curve, model_sampling: Any) -> Curve:
    """`curve` as a function of sigma. The host only turns fractions into sigmas, and gives the two
    ends special values."""
    fractions = np.linspace(0, 1, _GRID)
    sigmas = [float(model_sampling.percent_to_sigma(x)) for x in fractions[1:-1]]
    ends = float(model_sampling.sigma_max), float(model_sampling.sigma_min)
    falling = np.log(np.maximum([ends[0], *sigmas, ends[1]], 1e-12))

    def at(sigma: float) -> float:
        where = np.interp(-math.log(max(sigma, 1e-12)), -falling, fractions)
        return float(curve(float(where)))

    return at
