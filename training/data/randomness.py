"""All randomness of one sample, from the run's seed and the sample's number alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError

LATENT_CHANNELS = 4
CAPTIONS, BALANCE = 2**30, 2**30 + 1  # keys that no bucket's and no lane's number reaches
MAX_SEED = 2**63 - 1


def counted(seed: int, *key: int) -> np.random.RandomState:
    """Return the random numbers that belong to a key in a run: of an epoch, a bucket, a lane.

    Counter-based (Philox), so that any key's can be had without those before. RandomState, not
    Generator: numpy promises that its streams never change (NEP 19), so a run resumed under
    another numpy keeps its order.
    """
    return np.random.RandomState(np.random.Philox(np.random.SeedSequence((seed, *key))))


def check_drop_rates(*rates: float) -> None:
    """Raise TrainingError unless `rates` (image, text, both) are shares of the samples."""
    if not (min(rates) >= 0 and sum(rates) <= 1):
        raise TrainingError(
            f"i_drop_rate, t_drop_rate and ti_drop_rate are {rates}; expected shares of the "
            "samples between 0 and 1 whose sum is at most 1."
        )


@dataclass(frozen=True)
class NoiseSettings:
    """What is drawn. Raises TrainingError for shares or counts that cannot be.

    `drop_image`, `drop_text` and `drop_both` are shares of the samples; `timesteps` are the
    noise schedule's; `noise_offset` is the standard deviation of each channel's mean.
    """

    seed: int
    drop_image: float
    drop_text: float
    drop_both: float
    timesteps: int
    noise_offset: float

    def __post_init__(self) -> None:
        check_drop_rates(self.drop_image, self.drop_text, self.drop_both)
        if self.timesteps < 1:
            raise TrainingError(f"timesteps is {self.timesteps}; expected at least 1.")
        if not 0 <= self.seed <= MAX_SEED:
            raise TrainingError(f"seed is {self.seed}; expected 0 to {MAX_SEED}.")


class SampleNoise(NamedTuple):
    """What is random of one sample.

    `timestep` in [0, timesteps); `noise` and `latent_noise` (4, h, w) float32: what is added to the
    latents, and the sample of the VAE's posterior.
    """

    timestep: int
    noise: Tensor
    latent_noise: Tensor
    drop_image: bool
    drop_text: bool


def sample_noise(settings: NoiseSettings, number: int, latent_size: tuple[int, int]) -> SampleNoise:
    """Draw the noise of sample `number` of the run, for latents of `(h, w)`.

    One uniform number decides the drop, as the reference does (tencent-ailab/IP-Adapter,
    tutorial_train.py, MyDataset.__getitem__). Always drawn in the same order and number, so that
    no setting changes what another one draws.
    """
    generator = torch.Generator().manual_seed(sample_seed(settings.seed, number))
    drop, time = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
    shape = (LATENT_CHANNELS, *latent_size)
    noise = torch.randn(shape, generator=generator)
    latent_noise = torch.randn(shape, generator=generator)
    offset = torch.randn((LATENT_CHANNELS, 1, 1), generator=generator)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * offset
    image_only = settings.drop_image
    text_only = image_only + settings.drop_text
    both = text_only + settings.drop_both
    return SampleNoise(
        timestep=int(time * settings.timesteps),
        noise=noise,
        latent_noise=latent_noise,
        drop_image=drop < image_only or text_only <= drop < both,
        drop_text=image_only <= drop < both,
    )


def sample_caption(seed: int, number: int, captions: int) -> int:
    """Return which of its row's `captions` sample `number` of a run is given."""
    if captions == 1:
        return 0
    return int(counted(seed, number, CAPTIONS).randint(captions))


def sample_seed(seed: int, number: int) -> int:
    """Return a seed for sample `number` of a run, different for each of 2³² numbers.

    torch's CPU generator keeps only 32 bits of a seed: a hash into so few would give some of a
    run's millions of samples the noise of another.
    """
    return (_mixed(number & _BITS) + _constant(seed)) & _BITS


_BITS = 0xFFFFFFFF


@lru_cache
def _constant(seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")


def _mixed(x: int) -> int:
    """MurmurHash3's finaliser: a permutation of the 32-bit numbers."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _BITS
    x = (x ^ x >> 13) * 0xC2B2AE35 & _BITS
    return x ^ x >> 16
