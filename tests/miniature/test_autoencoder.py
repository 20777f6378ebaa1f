"""The thin autoencoder inside TAESD's layout, in ComfyUI, diffusers and training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from miniature.autoencoder import Autoencoder
from miniature.scenes import render, scenes
from tests.support.random_models import under
from training.models.frozen import _posterior
from training.models.single_file import SingleFile


@pytest.fixture(scope="module")
def thin():
    """Random weights, scaled so that pictures and latents spread."""
    torch.manual_seed(0)
    model = Autoencoder()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def seen(thin):
    pictures = render(scenes(1, 4))
    return pictures, thin.encoder(pictures)


def apart(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_comfyui_runs_it_as_its_own(host, thin, seen):
    from comfy.sd import VAE

    pictures, latents = seen
    vae = VAE(sd={**thin.taesd(), "vae_scale": torch.tensor(0.18215)})
    found = vae.encode(pictures.movedim(1, -1))
    assert apart(found * 0.18215, latents) < 1e-4
    drawn = vae.decode(latents / 0.18215).movedim(-1, 1)
    assert float((drawn - thin.decode(latents)).abs().max()) < 1e-4


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_training_reads_it_from_a_checkpoint(thin, seen, tmp_path, prefix, suffix):
    path = tmp_path / f"vae{suffix}"
    state = under(prefix, thin.taesd())
    torch.save({"state_dict": state}, path) if suffix == ".ckpt" else save_file(state, path)
    vae = SingleFile(path).vae_alone("sd15")
    pictures, latents = seen
    mean, log_variance = _posterior(vae, pictures * 2 - 1)
    assert apart(mean, latents) < 1e-5
    assert float(log_variance.max()) <= -30
    assert vae.config.scaling_factor == 1
    drawn = vae.decode(latents).sample / 2 + 0.5
    assert float((drawn.clamp(0, 1) - thin.decode(latents)).abs().max()) < 1e-4
