"""The small models by themselves: what they are in ComfyUI, diffusers and training."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from miniature.models import Autoencoder, fit, text_state, text_states
from miniature.scenes import caption, render, scenes
from tests.support import random_models
from training.models.frozen import _posterior
from training.models.single_file import SingleFile


@pytest.fixture(scope="module")
def thin():
    """Random weights, scaled so that images and latents spread."""
    torch.manual_seed(0)
    model = Autoencoder()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encoded(thin):
    images = render(scenes(1, 4))
    return images, thin.encoder(images)


def apart(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_comfyui_runs_the_thin_autoencoder_as_its_own(host, thin, encoded):
    from comfy.sd import VAE

    images, latents = encoded
    vae = VAE(sd={**thin.taesd(), "vae_scale": torch.tensor(0.18215)})
    assert apart(vae.encode(images.movedim(1, -1)) * 0.18215, latents) < 1e-4
    decoded = vae.decode(latents / 0.18215).movedim(-1, 1)
    assert float((decoded - thin.decode(latents)).abs().max()) < 1e-4


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_training_reads_it_from_a_checkpoint(thin, encoded, tmp_path, prefix, suffix):
    path = tmp_path / f"vae{suffix}"
    state = random_models.under(prefix, thin.taesd())
    torch.save({"state_dict": state}, path) if suffix == ".ckpt" else save_file(state, path)
    vae = SingleFile(path).vae_alone("sd15")
    images, latents = encoded
    mean, log_variance = _posterior(vae, images * 2 - 1)
    assert apart(mean, latents) < 1e-5
    assert float(log_variance.max()) <= -30
    assert vae.config.scaling_factor == 1
    decoded = vae.decode(latents).sample / 2 + 0.5
    assert float((decoded.clamp(0, 1) - thin.decode(latents)).abs().max()) < 1e-4


TEXT_WEIGHTS = {  # three tensors' mean squares and first numbers, when the base was trained
    "embeddings.token_embedding.weight": (1.0, [1.5703, 1.1270, 2.0605]),
    "encoder.layers.5.mlp.fc1.weight": (1.30196e-3, [-0.021744, 0.048096, -0.023560]),
    "encoder.layers.11.self_attn.q_proj.bias": (1.00075e-3, [0.017731, -0.00013065, 0.017883]),
}


def test_the_text_encoder_is_the_one_that_the_shipped_base_was_trained_with():
    """It is not shipped: whatever changes its random weights makes the base deaf."""
    state = text_state()
    layout = repr(sorted((key, tuple(x.shape)) for key, x in state.items()))
    assert hashlib.sha256(layout.encode()).hexdigest()[:16] == "35cbbce536d551ae"
    for name, (square, first) in TEXT_WEIGHTS.items():
        found = state[f"text_model.{name}"].float()
        assert float(found.square().mean()) == pytest.approx(square, rel=1e-3), name
        assert found.flatten()[:3].tolist() == pytest.approx(first, rel=2e-3), name


def test_states_of_many_texts_are_those_of_each(monkeypatch):
    captions = [caption(shape) for shape in range(3)]
    alone = torch.cat([text_states([one]) for one in captions])
    monkeypatch.setattr("miniature.models._TEXTS_AT_ONCE", 2)
    together = text_states(captions, stored=torch.float16)
    assert together.shape == (3, 77, 768) and together.dtype == torch.float16
    assert float((together - alone).abs().max()) < 2e-3 * float(alone.abs().max())
    assert not torch.allclose(together[0], together[2])


def test_a_fit_sets_the_rate_clips_and_trains():
    """Gradient descent on x², by hand: 1 − 2 · 0.1, then clipped to a norm of 1."""
    x = torch.nn.Parameter(torch.ones(1))
    seen = []

    def loss_at(step):
        seen.append((step, float(x)))
        return (x if step else x**2).sum() * (1 if step == 0 else 50)

    fit("x", torch.optim.SGD([x], lr=9), loss_at, 2, lambda step: (0.1, 0.2)[step])
    assert seen == [(0, 1.0), (1, pytest.approx(0.8))] and float(x) == pytest.approx(0.8 - 10)
    fit("x", torch.optim.SGD([x], lr=0.5), lambda _: 50 * x.sum(), 1, clipped=[x])
    assert float(x) == pytest.approx(0.8 - 10 - 0.5)
