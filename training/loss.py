"""The diffusion side of a training step: noise, target, loss weights, dropped conditions.

Batches are dicts of stacked tensors, `B` samples each (see data/dataset.py). Nothing here draws
a random number: they come with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from .errors import TrainingError

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """`prediction`: what the base's UNet predicts, "auto" as its own configuration says.

    Raises TrainingError for a combination without meaning.
    """

    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    min_snr_gamma: float | None = None
    debiased_estimation: bool = False
    zero_terminal_snr: bool = False

    def schedule(self, base: Mapping[str, Any]) -> Any:
        """The DDPMScheduler of training; `base`: the configuration of the base's scheduler."""
        if self.debiased_estimation and self.min_snr_gamma is not None:
            raise TrainingError(
                f"min_snr_gamma {self.min_snr_gamma:g} and debiased_estimation are two weights for "
                "one loss; leave one of them out."
            )
        changes: dict[str, Any] = {}
        if self.zero_terminal_snr:  # else as the base has it
            changes["rescale_betas_zero_snr"] = True
        if self.prediction != "auto":
            changes["prediction_type"] = self.prediction
        schedule: Any = DDPMScheduler.from_config(dict(base), **changes)
        found = schedule.config.prediction_type
        if found not in ("epsilon", "v_prediction"):
            raise TrainingError(
                f"The base predicts {found!r}; an adapter can be trained on bases that predict "
                "'epsilon' or 'v_prediction'."
            )
        if self.zero_terminal_snr and found == "epsilon":
            raise TrainingError(
                "zero_terminal_snr needs a base with v_prediction: at the last timestep there is "
                "only noise left, from which predicting the noise teaches nothing. This base "
                "predicts epsilon; turn zero_terminal_snr off."
            )
        return schedule

    def loss_weights(self, schedule: Any, timesteps: Tensor) -> Tensor:
        """`(B,)`: 1, or min-SNR-γ's (arXiv 2303.09556, section 3.4), or 1/√SNR (arXiv 2310.08442).
        Both are said of the noise's squared error, which is SNR / (SNR + 1) times v's.
        """
        if self.min_snr_gamma is None and not self.debiased_estimation:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(schedule, timesteps).float()
        divisor = snr + 1 if schedule.config.prediction_type == "v_prediction" else snr
        if self.min_snr_gamma is None:
            return snr.sqrt() / divisor
        return snr.clamp(max=self.min_snr_gamma) / divisor


@dataclass(frozen=True)
class Dropped:
    """What stands in for a dropped condition.

    `features (1, …)`: a zero embedding, or the encoder's states of zero pixels. `states (1, 77,
    D)` and `pooled (1, P)`: the text encoders' of the empty text.
    """

    features: Tensor
    states: Tensor
    pooled: Tensor | None


def latents(batch: Batch, scaling: float, shift: float = 0.0) -> Tensor:
    """`(B, 4, h, w)`: a sample of the VAE's posterior, scaled for the UNet, in float32."""
    log_variance = batch["log_variance"].float().clamp(-30, 20)  # as diffusers' posterior
    sample = batch["mean"].float() + torch.exp(log_variance / 2) * batch["latent_noise"]
    return (sample - shift) * scaling


def noised(schedule: Any, clean: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the UNet sees and what it shall predict, both `(B, 4, h, w)`."""
    noise, timesteps = batch["noise"], batch["timestep"]
    seen = schedule.add_noise(clean, noise, timesteps)
    if schedule.config.prediction_type == "v_prediction":
        return seen, schedule.get_velocity(clean, noise, timesteps)
    return seen, noise


def conditions(batch: Batch, dropped: Dropped) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, text states and pooled text, with what stands in where the draw says so."""
    no_image, no_text = batch["drop_image"], batch["drop_text"]
    features = _where(no_image, dropped.features, batch["features"])
    states = _where(no_text, dropped.states, batch["states"])
    if dropped.pooled is None:
        return features, states, None
    return features, states, _where(no_text, dropped.pooled, batch["pooled"])


def _where(rows: Tensor, there: Tensor, elsewhere: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (elsewhere.ndim - 1)), there, elsewhere)


def loss(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error in float32, samples weighted by `weights (B,)`.

    The mean is over all B, whatever their weights: so the halves of a batch on two processes
    average to the whole, also where one of them holds a broken picture (weight 0).
    """
    errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return (errors * weights).mean()
