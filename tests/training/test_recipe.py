"""The recipe, against a plain derivation of it that shares nothing with it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

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
    """The reference's training step as its scripts have it, from diffusers' own parts."""

    def __init__(self, settings, start):
        load = {"pretrained_model_name_or_path": settings.base}
        self.sdxl = "sdxl" in settings.base
        self.unet = UNet2DConditionModel.from_pretrained(**load, subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(**load, subfolder="vae")
        kinds = [CLIPTextModel, CLIPTextModelWithProjection] if self.sdxl else [CLIPTextModel]
        self.texts = [
            kind.from_pretrained(**load, subfolder=name)
            for kind, name in zip(kinds, ("text_encoder", "text_encoder_2"), strict=False)
        ]
        self.vision = CLIPVisionModelWithProjection.from_pretrained(settings.image_encoder)
        self.vision.eval()
        for frozen in (self.unet, self.vae, self.vision, *self.texts):
            frozen.requires_grad_(False)
        state: dict = {"image_proj": {}, "ip_adapter": {}}
        for key, value in start.items():
            part, name = key.split(".", 1)
            state[part][name] = value.clone()
        self.unet._load_ip_adapter_weights([state])
        trained = {
            name: p
            for name, p in self.unet.named_parameters()
            if "_ip." in name or "encoder_hid_proj" in name
        }
        for parameter in trained.values():
            parameter.requires_grad_(True)
        flat = [p for n, p in trained.items() if n.endswith("bias") or "norm" in n]
        rest = [p for p in trained.values() if all(p is not q for q in flat)]
        self.optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": flat, "weight_decay": 0}],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            foreach=False,
        )
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.signal = torch.cumprod(1 - betas, 0).float()
        self.trained = trained

    def text(self, tokens, empty, drop):
        tokens = [
            torch.where(drop[:, None], e[None], t) for t, e in zip(tokens, empty, strict=True)
        ]
        if not self.sdxl:
            return self.texts[0](tokens[0])[0], None
        outputs = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.texts, tokens, strict=True)
        ]
        return torch.cat([o.hidden_states[-2] for o in outputs], -1), outputs[1].text_embeds

    def step(self, batch, empty):
        posterior = self.vae.encode(batch["pixels"]).latent_dist
        latents = (posterior.mean + posterior.std * batch["latent_noise"]) * 0.18215
        if self.sdxl:
            latents = latents / 0.18215 * self.vae.config.scaling_factor
        signal = self.signal[batch["timestep"]].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * batch["noise"]
        states, pooled = self.text(batch["tokens"], empty, batch["drop_text"])
        embeds = self.vision(batch["reference"]).image_embeds
        embeds = torch.stack(
            [x * 0 if drop else x for x, drop in zip(embeds, batch["drop_image"], strict=True)]
        )
        added = {"image_embeds": [embeds[:, None]]}
        if self.sdxl:
            added |= {"text_embeds": pooled, "time_ids": batch["time_ids"]}
        predicted = self.unet(noisy, batch["timestep"], states, added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(predicted, batch["noise"])
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
