"""The loss of a training step, against a plain derivation of it that shares nothing with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from tests.support import small_models
from tests.support.reference_training import ReferenceStep, dropped
from training.config import LossConfig
from training.dataloader import Position, open_data
from training.errors import TrainingError
from training.loss import (
    DiffusionLoss,
    DroppedConditions,
    timestep_weights,
    training_scheduler,
    weighted_mse,
)
from training.metrics import MetricsLogger
from training.models.base import load_base
from training.models.frozen import FrozenEncoders, ImageEncoder
from training.trainer import Trainer

STEPS = 20
DROPS = {"i_drop_rate": 0.2, "t_drop_rate": 0.2, "ti_drop_rate": 0.2}


@pytest.fixture
def losses(monkeypatch):
    """What each step's loss was, of the runs in this test."""
    found: list[float] = []
    add = MetricsLogger.add

    def noting(self, loss, batch):
        found.append(loss.item())
        add(self, loss, batch)

    monkeypatch.setattr(MetricsLogger, "add", noting)
    return found


def batches(settings):
    """The run's batches once more: same pixels, tokens, noise and drops."""
    encoder = ImageEncoder.from_name(settings.image_encoder_path)
    base = load_base(settings.pretrained_model_name_or_path)
    encoders = FrozenEncoders(base, encoder, "image_embeds")
    position = Position(0, 1, settings.train_batch_size, 0)
    return iter(open_data(settings, encoders, 1000, position).batches)


class Plain:
    """The reference's loop as its scripts have it."""

    def __init__(self, settings, start):
        name = settings.pretrained_model_name_or_path
        self.model = ReferenceStep(name, settings.image_encoder_path, start, "sdxl" in name)
        trained = self.trained = self.model.trained
        flat = [p for n, p in trained.items() if n.endswith("bias") or "norm" in n]
        rest = [p for p in trained.values() if all(p is not q for q in flat)]
        self.optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": flat, "weight_decay": 0}],
            lr=settings.learning_rate,
            weight_decay=settings.adam_weight_decay,
            foreach=False,
        )

    def step(self, batch, empty):
        given = {**batch, "tokens": dropped(batch["tokens"], empty, batch["drop_text"])}
        latents = self.model.latents(batch["pixels"], batch["latent_noise"])
        loss = self.model.loss(given, latents, batch["noise"], batch["timestep"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.nightly)])
def test_twenty_steps_follow_the_plain_derivation(settings, losses, arrow, family):
    given = settings(family, max_train_steps=STEPS, **DROPS)
    trainer = Trainer(given)
    start = {k: v.clone() for k, v in trainer.sampled().state_dict().items()}
    empty = trainer.encoders.tokenise("")
    plain = Plain(given, start)
    stream = batches(given)
    expected = [plain.step(next(stream), empty) for _ in range(STEPS)]

    trainer.train()
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    end = trainer.sampled().state_dict()
    moved = {k: (end[k] - start[k]).norm() for k in end}
    assert all(moved.values())
    theirs = [p for name, p in plain.trained.items() if name.endswith("to_v_ip.0.weight")]
    assert theirs
    for number, weight in enumerate(theirs):
        key = f"ip_adapter.{2 * number + 1}.to_v_ip.weight"
        assert (end[key] - weight).norm() < 1e-3 * moved[key]


@pytest.mark.parametrize(
    "variant",
    ["base", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("plus", "full"))],
)
def test_nothing_else_changes_not_one_bit(settings, arrow, variant):
    def parts():
        encoders = trainer.encoders
        modules = {"unet": trainer.unet, "vae": encoders.vae, "image": encoders.image_encoder}
        modules |= {f"text{i}": text.encoder for i, text in enumerate(encoders.text)}
        return {
            f"{m}.{k}": v.clone()
            for m, module in modules.items()
            for k, v in module.state_dict().items()
        }

    trainer = Trainer(settings(variant=variant))
    frozen = parts()
    trainer.train()
    after = parts()
    assert len(after) > 200
    assert all(torch.equal(frozen[k], v) for k, v in after.items())
    assert all(not p.requires_grad and p.grad is None for p in trainer.unet.parameters())


def scheduler(base=None, **changes):
    config = DDIMScheduler.from_config(small_models.scheduler().config, **(base or {})).config
    return training_scheduler(config, LossConfig(**changes))


def diffusion_loss(noise_scheduler=None, dropped=None, scaling_factor=1.0, shift_factor=None):
    vae = SimpleNamespace(scaling_factor=scaling_factor, shift_factor=shift_factor)
    return DiffusionLoss(None, vae, noise_scheduler, dropped, LossConfig())


def test_v_prediction_and_zero_terminal_snr():
    schedule = scheduler(prediction_type="v_prediction", zero_terminal_snr=True)
    clean, noise = torch.randn(2, 6, 4, 8, 8).unbind()
    timestep = torch.linspace(0, 999, 6).long()
    noisy, target = diffusion_loss(schedule).add_noise(
        clean, {"noise": noise, "timestep": timestep}
    )
    assert torch.allclose(noisy[-1], noise[-1], atol=1e-4)  # nothing of the picture
    assert torch.allclose(target[-1], -clean[-1], atol=1e-4)
    signal = schedule.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    torch.testing.assert_close(target, signal.sqrt() * noise - (1 - signal).sqrt() * clean)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr(prediction):
    schedule = scheduler(prediction_type=prediction)
    timesteps = torch.tensor([0, 1, 200, 500, 999])
    signal = schedule.alphas_cumprod[timesteps].double()
    snr = signal / (1 - signal)
    expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    found = timestep_weights(schedule, timesteps, LossConfig(snr_gamma=5))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(timestep_weights(schedule, timesteps, LossConfig()), torch.ones(5))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_debiased_estimation(prediction):
    """Its weighted loss is (ε̂ − ε)²/√SNR, whichever of ε and v the UNet predicts."""
    given = LossConfig(prediction_type=prediction, debiased_estimation_loss=True)
    schedule = training_scheduler(small_models.scheduler().config, given)
    timesteps = torch.tensor([0, 1, 200, 500, 999])
    signal = schedule.alphas_cumprod[timesteps].double()
    clean, noise, wrong = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def predicted(noise):
        if prediction == "epsilon":
            return noise
        return (noise - (1 - signal).sqrt() * noisy) / signal.sqrt()  # v, from x and ε

    error = (predicted(noise) - predicted(noise + wrong)) ** 2
    weights = timestep_weights(schedule, timesteps, given)
    snr = signal / (1 - signal)
    torch.testing.assert_close(weights.double() * error, wrong**2 / snr.sqrt(), rtol=1e-4, atol=0)


def test_the_bases_own_prediction_is_found():
    found = scheduler({"prediction_type": "v_prediction"})
    assert isinstance(found, DDPMScheduler)
    assert found.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "changes, base, said",
    [
        ({"zero_terminal_snr": True}, {}, "needs a model with v_prediction"),
        ({}, {"prediction_type": "sample"}, "predicts 'sample'"),
        ({"snr_gamma": 5, "debiased_estimation_loss": True}, {}, "leave one of them out"),
    ],
)
def test_combinations_without_meaning(changes, base, said):
    with pytest.raises(TrainingError, match=said):
        scheduler(base, **changes)


def test_dropped_conditions():
    given = {
        "features": torch.ones(4, 5, 3),
        "states": torch.ones(4, 7, 2),
        "pooled": torch.ones(4, 6),
        "drop_image": torch.tensor([False, True, False, True]),
        "drop_text": torch.tensor([False, False, True, True]),
    }
    dropped = DroppedConditions(torch.zeros(1, 5, 3), torch.full((1, 7, 2), 2.0), torch.zeros(1, 6))
    features, states, pooled = diffusion_loss(dropped=dropped).drop_conditions(given)
    assert features.mean((1, 2)).tolist() == [1, 0, 1, 0]
    assert states.mean((1, 2)).tolist() == [1, 1, 2, 2]
    assert pooled.mean(1).tolist() == [1, 1, 0, 0]


def test_the_posterior_is_sampled_as_diffusers_does():
    moments = torch.randn(2, 8, 4, 4) * 20  # log-variances out of their range
    posterior = DiagonalGaussianDistribution(moments)
    noise = torch.randn(2, 4, 4, 4)
    mean, log_variance = moments.chunk(2, dim=1)
    given = {"mean": mean, "log_variance": log_variance, "latent_noise": noise}
    expected = (posterior.mean + posterior.std * noise - 0.1) * 0.5
    torch.testing.assert_close(diffusion_loss(None, None, 0.5, 0.1).sample_latents(given), expected)


def test_halves_of_a_batch_average_to_the_whole_also_with_broken_pictures():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 4, 8, 8).unbind()
    weights = torch.tensor([1.0, 0, 1, 1, 1, 1])
    halves = [weighted_mse(*x) for x in zip(a.chunk(2), b.chunk(2), weights.chunk(2), strict=True)]
    torch.testing.assert_close(sum(halves) / 2, weighted_mse(a, b, weights))
    assert weighted_mse(a.half(), b.half(), weights).dtype == torch.float32
