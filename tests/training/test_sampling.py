"""Pictures drawn here are those that diffusers' own pipelines draw of the same weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import save_file

from tests.support import small_models as small
from training.models.base import load_base
from training.sampling import (
    NotFinite,
    Prompts,
    Sampler,
    SamplingOptions,
    encode_text,
    starting_noise,
)
from training.unet import attach

TOLERANCE = 1e-4
TEXTS = ("a red square", "", "two small birds on a wire")
SEEDS = (3, 4, 11)
STEPS = 6


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.nightly)])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family)
    small.base(path, family, levels=2)
    return path


@pytest.fixture(scope="module")
def base(folder):
    base = load_base(str(folder))
    attach(base.unet)
    return base


@pytest.fixture
def adapter(family):
    return small.adapter(family, "base")


def settings(**changed):
    return SamplingOptions(**{"steps": STEPS, "guidance": 4.0, **changed})


def prompts(base, adapter, weights=(0.6, 0.6, 0.6)):
    generator = torch.Generator().manual_seed(0)
    patches = () if adapter.spec.features == "image_embeds" else (17,)
    shape = (*patches, adapter.spec.feature_dim)
    features = torch.randn(3, *shape, generator=generator)
    zero = torch.randn(1, *shape, generator=generator)
    return Prompts(encode_text(base, TEXTS), features, zero, weights, SEEDS)


@pytest.fixture
def theirs(folder, tmp_path):
    """Diffusers' latents or pictures, through a file of the adapter's weights.

    Picture by picture: a call takes one image prompt, and lets every row attend to all others.
    """

    def theirs(adapter, asked, *, scheduler=None, output="latent", **changed):
        save_file(adapter.state_dict(), tmp_path / "adapter.safetensors")
        pipeline = DiffusionPipeline.from_pretrained(folder)
        config = {**pipeline.scheduler.config, **(scheduler or {})}
        pipeline.scheduler = DDIMScheduler.from_config(config)
        pipeline.load_ip_adapter(
            tmp_path, subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None
        )
        pipeline.set_ip_adapter_scale(asked.weights[0])
        pipeline.set_progress_bar_config(disable=True)
        given = {"guidance_scale": 4.0, "negative_prompt": "", **changed}
        drawn = []
        for text, seed, features in zip(TEXTS, SEEDS, asked.features, strict=True):
            rows = [asked.zero[0], features] if given["guidance_scale"] > 1 else [features]
            drawn += pipeline(
                prompt=text,
                ip_adapter_image_embeds=[torch.stack(rows)[:, None]],
                generator=torch.Generator().manual_seed(seed),
                num_inference_steps=STEPS,
                output_type=output,
                **given,
            ).images
        return drawn if output == "pil" else torch.stack(drawn)

    return theirs


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def check_alike(found, expected):
    """Of two lists of pictures: no pixel differs by more than the last rounding."""
    pixels = [np.stack([np.asarray(p) for p in drawn]).astype(int) for drawn in (found, expected)]
    assert abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize(
    "family, variant", [("sd15", "base"), ("sdxl", "plus")], indirect=["family"]
)
def test_latents_are_diffusers(family, base, theirs, variant):
    adapter = small.adapter(family, variant)
    asked = prompts(base, adapter)
    sampler = Sampler(base, settings())
    expected = theirs(adapter, asked)
    assert error(sampler.latents(adapter, asked), expected) < TOLERANCE
    plain = sampler.latents(adapter, dataclasses.replace(asked, weights=(0.0, 0.0, 0.0)))
    assert error(plain, expected) > 100 * TOLERANCE, "no effect, so this shows nothing"


def test_without_guidance(base, adapter, theirs, monkeypatch):
    asked = prompts(base, adapter)
    rows, forward = set(), base.unet.forward
    monkeypatch.setattr(
        base.unet, "forward", lambda x, *a, **k: rows.add(len(x)) or forward(x, *a, **k)
    )
    found = Sampler(base, settings(guidance=1.0)).latents(adapter, asked)
    assert rows == {3}, "twice the work"
    assert error(found, theirs(adapter, asked, guidance_scale=1.0)) < TOLERANCE


def test_a_negative_text_and_another_size(base, adapter, theirs):
    asked = prompts(base, adapter)
    found = Sampler(base, settings(negative="grey", size=(24, 16))).latents(adapter, asked)
    expected = theirs(adapter, asked, negative_prompt="grey", height=24, width=16)
    assert found.shape == (3, 4, 12, 8)
    assert error(found, expected) < TOLERANCE


def test_another_noise_schedule(base, adapter, theirs):
    asked = prompts(base, adapter)
    other = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    found = Sampler(base, settings(), other).latents(adapter, asked)
    expected = theirs(adapter, asked, scheduler={**other, "timestep_spacing": "trailing"})
    assert error(found, expected) < TOLERANCE


def test_pictures_are_diffusers(base, adapter, theirs):
    asked = prompts(base, adapter)
    found = Sampler(base, settings()).draw(adapter, asked)
    assert [picture.size for picture in found] == [(16, 16)] * 3
    check_alike(found, theirs(adapter, asked, output="pil"))


def test_latents_are_never_clipped(base, adapter):
    clipping = dataclasses.replace(base, scheduler={**base.scheduler, "clip_sample": True})
    asked = prompts(base, adapter)
    found = Sampler(clipping, settings()).latents(adapter, asked)
    assert torch.equal(found, Sampler(base, settings()).latents(adapter, asked))


def test_each_picture_has_its_own_weight(base, adapter):
    sampler = Sampler(base, settings())
    mixed = sampler.latents(adapter, prompts(base, adapter, (0.0, 0.5, 1.0)))
    for place, weight in enumerate((0.0, 0.5, 1.0)):
        alone = sampler.latents(adapter, prompts(base, adapter, (weight,) * 3))
        assert error(mixed[place], alone[place]) < TOLERANCE


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once(base, adapter, monkeypatch):
    together = starting_noise(SEEDS, (4, 8, 8))
    for noise, seed in zip(together, SEEDS, strict=True):
        assert torch.equal(noise, starting_noise([seed], (4, 8, 8))[0])
    asked = prompts(base, adapter)
    whole = Sampler(base, settings()).draw(adapter, asked)
    sizes, latents = [], Sampler.latents
    count = lambda self, adapter, p: sizes.append(len(p)) or latents(self, adapter, p)  # noqa: E731
    monkeypatch.setattr(Sampler, "latents", count)
    check_alike(Sampler(base, settings(batch=2)).draw(adapter, asked), whole)
    assert sizes == [2, 1]


def test_adapter_and_base_are_left_as_they_were(base, adapter):
    adapter.train().requires_grad_(True)
    modules = (*base.unet.modules(), *adapter.modules())
    modes = [module.training for module in modules]
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    latents = Sampler(base, settings()).latents(adapter, prompts(base, adapter))
    assert not latents.requires_grad
    assert modes == [module.training for module in modules]
    assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in adapter.parameters())


def test_half_precision_adapter_and_base(folder, base, adapter):
    half = load_base(str(folder), torch.bfloat16)
    attach(half.unet)
    asked = prompts(half, adapter)
    found = Sampler(half, settings()).latents(adapter.to(torch.float16), asked)
    expected = Sampler(base, settings()).latents(adapter.float(), prompts(base, adapter))
    assert found.dtype == torch.float32
    assert error(found, expected) < 0.1


def test_a_diverged_adapter_is_named(base, adapter):
    adapter.image_proj.proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"seeds \[3, 4, 11\].*weights \[0.6.*diverged"):
        Sampler(base, settings()).draw(adapter, prompts(base, adapter))


def test_texts_of_any_length(base):
    assert encode_text(base, ["", "word " * 200]).states.shape[:2] == (2, 77)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"size": (20, 16)}])
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match=r"must be|expected a multiple of 8"):
        settings(**wrong)
