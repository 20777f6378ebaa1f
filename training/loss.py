"""The loss of one batch: paper, section 3.1, with both conditions.

Batches are dicts of stacked tensors, `B` samples each, as `FrozenEncoders.encode`
gives them or a cache holds them. Nothing here draws a random number: they come with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from .config import LossConfig
from .errors import TrainingError
from .unet import attention_inputs

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class DroppedConditions:
    """What stands in for a dropped condition.

    `features (1, …)`: a zero embedding, or the encoder's states of zero pixels. `states (1, 77, D)`
    and `pooled (1, P)`: the text encoders' of the empty text.
    """

    features: Tensor
    states: Tensor
    pooled: Tensor | None

    def to(self, device: torch.device) -> DroppedConditions:
        """Return them on `device`."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return DroppedConditions(self.features.to(device), self.states.to(device), pooled)


class DiffusionLoss:
    """The error of the frozen UNet's prediction, with the adapter's keys and values.

    `training.unet.attach` has prepared `unet`; `vae_config` tells the scale of latents, `config`
    the weights of timesteps; `dropped` lies on the UNet's device.
    """

    def __init__(
        self,
        unet: Any,
        vae_config: Any,
        noise_scheduler: Any,
        dropped: DroppedConditions,
        config: LossConfig,
    ) -> None:
        self.unet, self.noise_scheduler = unet, noise_scheduler
        self.dropped, self.config = dropped, config
        self.scaling_factor: float = vae_config.scaling_factor
        self.shift_factor: float = getattr(vae_config, "shift_factor", None) or 0.0

    def __call__(self, adapter: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of an encoded batch; gradients flow into `adapter`."""
        latents = self.sample_latents(batch)
        noisy_latents, target = self.add_noise(latents, batch)
        features, states, pooled = self.drop_conditions(batch)
        dtype = self.unet.dtype
        # The adapter's weights are float32; it computes in the precision of the frozen models.
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
            keys_values = adapter(features.float())
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled.to(dtype), "time_ids": batch["time_ids"]}
        prediction = self.unet(
            noisy_latents.to(dtype),
            batch["timestep"],
            states.to(dtype),
            added_cond_kwargs=added,
            cross_attention_kwargs=attention_inputs(keys_values, adapter),
            return_dict=False,
        )[0]
        weights = timestep_weights(self.noise_scheduler, batch["timestep"], self.config)
        return weighted_mse(prediction, target, batch["weight"] * weights)

    def sample_latents(self, batch: Batch) -> Tensor:
        """Sample the VAE's posterior: `(B, 4, h, w)` in float32, scaled for the UNet."""
        log_variance = batch["log_variance"].float().clamp(-30, 20)  # as diffusers' posterior
        sample = batch["mean"].float() + torch.exp(log_variance / 2) * batch["latent_noise"]
        return (sample - self.shift_factor) * self.scaling_factor

    def add_noise(self, latents: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return noisy latents and what the UNet shall predict of them, both `(B, 4, h, w)`."""
        noise, timesteps = batch["noise"], batch["timestep"]
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            return noisy_latents, self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return noisy_latents, noise

    def drop_conditions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return features, prompt embeds and pooled ones, replaced where the batch drops them."""

        def where(drop: Tensor, dropped: Tensor, given: Tensor) -> Tensor:
            return torch.where(drop.view(-1, *[1] * (given.ndim - 1)), dropped, given)

        no_text = batch["drop_text"]
        features = where(batch["drop_image"], self.dropped.features, batch["features"])
        states = where(no_text, self.dropped.states, batch["states"])
        if self.dropped.pooled is None:
            return features, states, None
        return features, states, where(no_text, self.dropped.pooled, batch["pooled"])


def training_scheduler(base: Mapping[str, Any], config: LossConfig) -> Any:
    """Build the DDPMScheduler of training: the diffusion model's own, but for what `config` says.

    Raises TrainingError for a combination without meaning.
    """
    if config.debiased_estimation_loss and config.snr_gamma is not None:
        raise TrainingError(
            f"snr_gamma {config.snr_gamma:g} and debiased_estimation_loss are two weights for one "
            "loss; leave one of them out."
        )
    changes: dict[str, Any] = {}
    if config.zero_terminal_snr:  # else as the base has it
        changes["rescale_betas_zero_snr"] = True
    if config.prediction_type != "auto":
        changes["prediction_type"] = config.prediction_type
    scheduler: Any = DDPMScheduler.from_config(dict(base), **changes)
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise TrainingError(
            f"The model predicts {prediction_type!r}; an adapter can be trained on models that "
            "predict 'epsilon' or 'v_prediction'."
        )
    if config.zero_terminal_snr and prediction_type == "epsilon":
        raise TrainingError(
            "zero_terminal_snr needs a model with v_prediction: at the last timestep there is only "
            "noise left, from which predicting the noise teaches nothing. This model predicts "
            "epsilon; turn zero_terminal_snr off."
        )
    return scheduler


def timestep_weights(scheduler: Any, timesteps: Tensor, config: LossConfig) -> Tensor:
    """Return each sample's weight `(B,)`.

    1, or min-SNR-γ's (arXiv 2303.09556, section 3.4), or 1/√SNR (arXiv 2310.08442).
    Both are said of the noise's squared error, which is SNR / (SNR + 1) times v's.
    """
    if config.snr_gamma is None and not config.debiased_estimation_loss:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(scheduler, timesteps).float()
    divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    if config.snr_gamma is None:
        return snr.sqrt() / divisor
    return snr.clamp(max=config.snr_gamma) / divisor


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the mean squared error in float32, samples weighted by `weights (B,)`.

    The mean is over all B, whatever their weights: so the halves of a batch on two processes
    average to the whole, also where one of them holds a broken image (weight 0).
    """
    errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return (errors * weights).mean()
