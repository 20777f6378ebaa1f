"""When an image prompt acts, and how strongly, as the steps go by."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .host import CurveInput

_ASKED = 385  # places of the schedule whose sigma the model is asked for, each a wait for a GPU
_PLACES = 2**16  # places at which a curve is known, besides the run's own sigmas

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """The window `start … end`, fractions of the schedule, and a curve over all of it.

    The curve goes from such a fraction to a multiplier of λ. Equal schedules share what a run
    prepares.
    """

    start: float = 0.0
    end: float = 1.0
    curve: CurveInput | None = None

    def prepare(
        self, model_sampling: Any, sigmas: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> PreparedSchedule:
        """In the sigmas of the model that is sampled, and exact at those of the run."""
        table = None
        if self.curve is not None:
            steps = [] if sigmas is None else sigmas.flatten().tolist()
            places, factors = _table(self.curve, model_sampling, steps)
            table = places.to(device), factors.to(device, dtype)
        return PreparedSchedule(
            windowed=self.start > 0 or self.end < 1,
            sigma_start=float(model_sampling.percent_to_sigma(self.start)),
            sigma_end=float(model_sampling.percent_to_sigma(self.end)),
            table=table,
        )


@dataclass(frozen=True, eq=False)
class PreparedSchedule:
    """A schedule in sigmas.

    `table`: rising sigmas and a factor of λ for each, both `(n,)` on the device: looking one up
    there makes nobody wait for the device, as asking for the sigma would.
    """

    windowed: bool
    sigma_start: float
    sigma_end: float
    table: tuple[Tensor, Tensor] | None

    def includes(self, sigma: float) -> bool:
        """As ComfyUI's own ranges: both ends belong to the window."""
        return self.sigma_end <= sigma <= self.sigma_start


@dataclass(frozen=True, eq=False)
class Moment:
    """One evaluation of the model at the sigma `timestep (B,)`, all rows alike."""

    timestep: Tensor
    _factors: dict[PreparedSchedule, Tensor] = field(default_factory=dict)

    @cached_property
    def sigma(self) -> float:
        """Waits for the device."""
        return float(self.timestep[0].item())

    def factor(self, schedule: PreparedSchedule) -> Tensor | None:
        """Return the curve's factor of λ, `(1,)`; None where there is no curve."""
        if schedule.table is None:
            return None
        if schedule not in self._factors:
            sigmas, factors = schedule.table
            place = torch.searchsorted(sigmas, self.timestep[:1].to(sigmas))
            self._factors[schedule] = factors.index_select(0, place)
        return self._factors[schedule]


def _table(curve: CurveInput, model_sampling: Any, steps: list[float]) -> tuple[Tensor, Tensor]:
    """Tabulate the curve over sigmas.

    At the run's `steps`, and densely for samplers that evaluate between them. Beyond the last place
    it goes on as there.
    """
    fractions, rising = _schedule(model_sampling)
    dense = np.exp(-np.interp(np.linspace(0, 1, _PLACES), fractions, rising))
    places = np.unique(np.concatenate([dense, steps]).astype(np.float32))
    factors = curve.interp_array(np.interp(_minus_log(places), rising, fractions))
    factors = np.append(factors, factors[-1]).astype(np.float32)
    return torch.from_numpy(places), torch.from_numpy(factors)


def _schedule(model_sampling: Any) -> tuple[Floats, Floats]:
    """Return fractions of the schedule and -log σ at each, nearly linear between them.

    They lie closer towards the ends, where it bends (Chebyshev nodes).
    """
    fractions = (1 - np.cos(np.linspace(0, np.pi, _ASKED))) / 2
    # ComfyUI only turns fractions into sigmas, and gives the two ends special values.
    ends = float(model_sampling.sigma_max), float(model_sampling.sigma_min)
    inner = [float(model_sampling.percent_to_sigma(x)) for x in fractions[1:-1].tolist()]
    return fractions, _minus_log([ends[0], *inner, ends[1]])


def _minus_log(sigmas: ArrayLike) -> Floats:
    logs: Floats = -np.log(np.maximum(np.asarray(sigmas, np.float64), 1e-12))
    return logs
