"""The draws of a sample: right in distribution, and a function of (seed, number) alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.data.randomness import NoiseSettings, sample_noise, sample_seed
from training.errors import TrainingError

SETTINGS = NoiseSettings(
    seed=7, drop_image=0.05, drop_text=0.1, drop_both=0.2, timesteps=1000, noise_offset=0.0
)
SAMPLES = 20_000
SMALL = (2, 2)


@pytest.fixture(scope="module")
def many():
    return [sample_noise(SETTINGS, number, SMALL) for number in range(SAMPLES)]


def near(count, share):
    return abs(count - share * SAMPLES) < 4 * (SAMPLES * share * (1 - share)) ** 0.5


def test_shares_of_drops(many):
    drops = [(one.drop_image, one.drop_text) for one in many]
    assert near(drops.count((True, False)), SETTINGS.drop_image)
    assert near(drops.count((False, True)), SETTINGS.drop_text)
    assert near(drops.count((True, True)), SETTINGS.drop_both)
    nothing = replace(SETTINGS, drop_image=0, drop_text=0, drop_both=0)
    everything = replace(nothing, drop_both=1.0)
    for number in range(200):
        assert not any(sample_noise(nothing, number, SMALL)[-2:])
        assert all(sample_noise(everything, number, SMALL)[-2:])


def test_timesteps_are_uniform(many):
    tenths = torch.bincount(torch.tensor([one.timestep // 100 for one in many]), minlength=10)
    assert len(tenths) == 10
    assert all(near(int(count), 0.1) for count in tenths)
    few = replace(SETTINGS, timesteps=3)
    assert {sample_noise(few, number, SMALL).timestep for number in range(100)} == {0, 1, 2}


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (64, 64)])
def test_noise_is_normal(size):
    samples = max(4, 40_000 // (4 * size[0] * size[1]))
    drawn = [sample_noise(SETTINGS, number, size) for number in range(samples)]
    noise = torch.stack([one.noise for one in drawn])
    latent = torch.stack([one.latent_noise for one in drawn])
    assert noise.shape == (samples, 4, *size)
    assert noise.dtype == latent.dtype == torch.float32
    for one in (noise, latent):
        assert abs(one.mean()) < 4 / one.numel() ** 0.5
        assert abs(one.var() - 1) < 4 * (2 / one.numel()) ** 0.5
        assert abs((one**4).mean() - 3) < 4 * (96 / one.numel()) ** 0.5
    assert abs((noise * latent).mean()) < 4 / noise.numel() ** 0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / noise[1:].numel() ** 0.5


def test_same_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = sample_noise(SETTINGS, 123, (8, 8))
    torch.manual_seed(2)
    sample_noise(SETTINGS, 5, (8, 8))
    state = torch.get_rng_state()
    again = sample_noise(SETTINGS, 123, (8, 8))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_numbers_and_seeds_differ():
    drawn = [
        sample_noise(replace(SETTINGS, seed=seed), number, SMALL)
        for seed in (0, 1, 2**32, 2**62)
        for number in (0, 1, 2, 2**31, 2**32 - 1)
    ]
    for name in ("noise", "latent_noise"):
        assert len({tuple(getattr(one, name).flatten().tolist()) for one in drawn}) == len(drawn)


def test_no_two_samples_of_a_run_share_a_seed():
    numbers = [*range(100_000), *range(2**32 - 100_000, 2**32)]
    assert len({sample_seed(3, number) for number in numbers}) == len(numbers)


def test_no_setting_changes_what_others_draw():
    plain = sample_noise(SETTINGS, 9, (8, 8))
    other = sample_noise(replace(SETTINGS, drop_both=0.9, drop_text=0.1, drop_image=0), 9, (8, 8))
    assert torch.equal(plain.noise, other.noise)
    assert plain.timestep == other.timestep
    longer = sample_noise(replace(SETTINGS, timesteps=10), 9, (8, 8))
    assert torch.equal(plain.latent_noise, longer.latent_noise)
    assert longer.timestep == plain.timestep // 100


def test_noise_offset_moves_channels_as_a_whole():
    shifts = []
    for number in range(2000):
        plain = sample_noise(SETTINGS, number, SMALL)
        offset = sample_noise(replace(SETTINGS, noise_offset=0.5), number, SMALL)
        assert torch.equal(plain.latent_noise, offset.latent_noise)
        moved = offset.noise - plain.noise
        assert torch.allclose(moved, moved[:, :1, :1].expand_as(moved), atol=1e-6)
        shifts.append(moved[:, 0, 0])
    found = torch.stack(shifts)
    assert abs(found.mean()) < 4 * 0.5 / found.numel() ** 0.5
    assert abs(found.std() - 0.5) < 4 * 0.5 / (2 * found.numel()) ** 0.5


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"drop_image": -0.1}, "between 0 and 1"),
        ({"drop_both": 0.9}, "sum is at most 1"),
        ({"drop_text": float("nan")}, "between 0 and 1"),
        ({"timesteps": 0}, "timesteps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "expected 0 to"),
    ],
)
def test_settings_that_cannot_be(wrong, said):
    with pytest.raises(TrainingError, match=said):
        replace(SETTINGS, **wrong)
