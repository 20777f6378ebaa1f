"""The recipe, against a plain derivation of it that shares nothing with it."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tests.support.reference_training import ReferenceStep, dropped
from training import loss as recipe
from training.errors import TrainingError
from training.loss import Recipe

STEPS = 20
DROPS = {"drop_image": 0.2, "drop_text": 0.2, "drop_both": 0.2}


@pytest.fixture
def losses(monkeypatch):
    """What each step's loss was, of the runs in this test."""
    from training.metrics import Meter

    found: list[float] = []
    add = Meter.add

    def noting(self, loss, batch):
        found.append(loss.item())
        add(self, loss, batch)

    monkeypatch.setattr(Meter, "add", noting)
    return found


def batches(settings):
    """The run's batches once more: same pixels, tokens, noise and drops."""
    from training.feed import Place, open_feed
    from training.models.base import load_base
    from training.models.frozen import FrozenEncoders, ImageEncoder

    encoder = ImageEncoder.from_name(settings.image_encoder)
    encoders = FrozenEncoders(load_base(settings.base), encoder, "image_embeds")
    return iter(open_feed(settings, encoders, 1000, Place(0, 1, settings.batch_size, 0)).batches)


class Plain:
    """The reference's loop as its scripts have it."""

    def __init__(self, settings, start):
        sdxl = "sdxl" in settings.base
        self.model = ReferenceStep(settings.base, settings.image_encoder, start, sdxl)
        trained = self.trained = self.model.trained
        flat = [p for n, p in trained.items() if n.endswith("bias") or "norm" in n]
        rest = [p for p in trained.values() if all(p is not q for q in flat)]
        self.optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": flat, "weight_decay": 0}],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
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


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_twenty_steps_follow_the_plain_derivation(settings, losses, arrow, family):
    from safetensors.torch import load_file

    from training.setup import prepare
    from training.train import train

    given = settings(family, steps=STEPS, save_every=STEPS, **DROPS)
    run = prepare(given)
    start = {k: v.clone() for k, v in run.sampled().state_dict().items()}
    empty = run.encode.__self__.tokenise("")  # of the frozen encoders
    plain = Plain(given, start)
    stream = batches(given)
    expected = [plain.step(next(stream), empty) for _ in range(STEPS)]

    train(settings(family, steps=STEPS, save_every=STEPS, **DROPS))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    end = load_file(f"{given.out}/checkpoints/step-{STEPS:07}/model.safetensors")
    assert end.keys() == start.keys()
    moved = {k: (end[k] - start[k]).norm() for k in end}
    assert all(moved.values())
    theirs = {n.split(".processor.")[-1]: p for n, p in plain.trained.items() if "_ip." in n}
    assert theirs
    for number, layer in enumerate(n for n in plain.trained if n.endswith("to_v_ip.0.weight")):
        mine = end[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"]
        difference = (mine - plain.trained[layer]).norm()
        assert (
            difference < 1e-3 * (mine - start[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"]).norm()
        )


@pytest.mark.parametrize("variant", ["base", "plus", "full"])
def test_nothing_else_changes_not_one_bit(settings, arrow, monkeypatch, variant):
    from training import train as script

    runs = []

    def keep(given):
        runs.append(prepare(given))
        run = runs[0]
        frozen.update({k: v.clone() for k, v in parts(run).items()})
        return run

    def parts(run):
        encoders = run.encode.__self__
        modules = {"unet": run.unet, "vae": encoders.vae, "image": encoders.image_encoder}
        modules |= {f"text{i}": text.encoder for i, text in enumerate(encoders.text)}
        return {
            f"{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()
        }

    frozen: dict[str, torch.Tensor] = {}
    prepare = script.prepare
    monkeypatch.setattr(script, "prepare", keep)
    script.train(settings(variant=variant))
    after = parts(runs[0])
    assert len(after) > 200
    assert all(torch.equal(frozen[k], v) for k, v in after.items())
    assert not any(p.requires_grad for p in runs[0].unet.parameters())
    assert all(p.grad is None for p in runs[0].unet.parameters())


def config(**changes):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changes
    )
    return dict(scheduler.config)


def batch(count=6):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 4, 8, 8, generator=generator)
    return {"noise": noise, "timestep": torch.linspace(0, 999, count).long()}


def test_v_prediction_and_zero_terminal_snr():
    schedule = Recipe("v_prediction", zero_terminal_snr=True).schedule(config())
    given = batch()
    clean = torch.randn(6, 4, 8, 8)
    seen, target = recipe.noised(schedule, clean, given)
    assert torch.allclose(seen[-1], given["noise"][-1], atol=1e-4)  # nothing of the picture
    assert torch.allclose(target[-1], -clean[-1], atol=1e-4)
    signal = schedule.alphas_cumprod[given["timestep"]].view(-1, 1, 1, 1)
    torch.testing.assert_close(target, signal.sqrt() * given["noise"] - (1 - signal).sqrt() * clean)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr(prediction):
    schedule = Recipe(prediction).schedule(config())
    timesteps = torch.tensor([0, 1, 200, 500, 999])
    signal = schedule.alphas_cumprod[timesteps].double()
    snr = signal / (1 - signal)
    expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    found = Recipe(prediction, min_snr_gamma=5).loss_weights(schedule, timesteps)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(Recipe(prediction).loss_weights(schedule, timesteps), torch.ones(5))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_debiased_estimation(prediction):
    """Its weighted loss is (ε̂ − ε)²/√SNR, whichever of ε and v the UNet predicts."""
    schedule = Recipe(prediction, debiased_estimation=True).schedule(config())
    timesteps = torch.tensor([0, 1, 200, 500, 999])
    signal = schedule.alphas_cumprod[timesteps].double()
    clean, noise, wrong = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def predicted(noise):
        if prediction == "epsilon":
            return noise
        return (noise - (1 - signal).sqrt() * noisy) / signal.sqrt()  # v, from x and ε

    error = (predicted(noise) - predicted(noise + wrong)) ** 2
    weights = Recipe(prediction, debiased_estimation=True).loss_weights(schedule, timesteps)
    snr = signal / (1 - signal)
    torch.testing.assert_close(weights.double() * error, wrong**2 / snr.sqrt(), rtol=1e-4, atol=0)


def test_the_bases_own_prediction_is_found():
    found = Recipe().schedule(config(prediction_type="v_prediction"))
    assert isinstance(found, DDPMScheduler)
    assert found.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "made, base, said",
    [
        (Recipe(zero_terminal_snr=True), {}, "needs a base with v_prediction"),
        (Recipe(), {"prediction_type": "sample"}, "predicts 'sample'"),
        (Recipe(min_snr_gamma=5, debiased_estimation=True), {}, "leave one of them out"),
    ],
)
def test_combinations_without_meaning(made, base, said):
    with pytest.raises(TrainingError, match=said):
        made.schedule(config(**base))


def test_dropped_conditions():
    given = {
        "features": torch.ones(4, 5, 3),
        "states": torch.ones(4, 7, 2),
        "pooled": torch.ones(4, 6),
        "drop_image": torch.tensor([False, True, False, True]),
        "drop_text": torch.tensor([False, False, True, True]),
    }
    dropped = recipe.Dropped(torch.zeros(1, 5, 3), torch.full((1, 7, 2), 2.0), torch.zeros(1, 6))
    features, states, pooled = recipe.conditions(given, dropped)
    assert features.mean((1, 2)).tolist() == [1, 0, 1, 0]
    assert states.mean((1, 2)).tolist() == [1, 1, 2, 2]
    assert pooled.mean(1).tolist() == [1, 1, 0, 0]


def test_the_posterior_is_sampled_as_diffusers_does():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 8, 4, 4) * 20  # log-variances out of their range
    posterior = DiagonalGaussianDistribution(moments)
    noise = torch.randn(2, 4, 4, 4)
    mean, log_variance = moments.chunk(2, dim=1)
    given = {"mean": mean, "log_variance": log_variance, "latent_noise": noise}
    expected = (posterior.mean + posterior.std * noise - 0.1) * 0.5
    torch.testing.assert_close(recipe.latents(given, 0.5, 0.1), expected)


def test_halves_of_a_batch_average_to_the_whole_also_with_broken_pictures():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 4, 8, 8).unbind()
    weights = torch.tensor([1.0, 0, 1, 1, 1, 1])
    halves = [recipe.loss(*x) for x in zip(a.chunk(2), b.chunk(2), weights.chunk(2), strict=True)]
    torch.testing.assert_close(sum(halves) / 2, recipe.loss(a, b, weights))
    assert recipe.loss(a.half(), b.half(), weights).dtype == torch.float32
