"""The frozen encoders give what diffusers' own pipelines condition on, and say who they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ip_adapter_core.variants import FAMILIES, FEATURE_KINDS
from tests.support import small_models
from tests.support.small_models import of_open_clip, of_transformers
from training import fingerprints
from training.data.dataset import collate
from training.data.randomness import NoiseSettings, sample_noise
from training.errors import TrainingError
from training.models import image_encoder
from training.models.base import load_encoders
from training.models.frozen import FrozenEncoders, Tokenise, text_states

EMBEDS, HIDDEN = FEATURE_KINDS


@torch.no_grad()
def close(a, b, tolerance=1e-5):
    return float((a - b).norm() / b.norm()) < tolerance


def loaded(folder, kind=EMBEDS, dtype=torch.float32):
    encoder = of_open_clip(small_models.open_clip_model()).to(dtype)
    return FrozenEncoders(load_encoders(str(folder), dtype), encoder, kind)


def example(encoders, number):
    generator = torch.Generator().manual_seed(number)
    side = small_models.SIDE
    return {
        "pixels": torch.randn(3, 64, 48, generator=generator),
        "reference": torch.randn(3, side, side, generator=generator),
        "tokens": encoders.tokenise(f"number {number}"),
        "time_ids": torch.arange(6.0),
        "draws": sample_noise(NoiseSettings(0, 0.1, 0.1, 0.1, 1000, 0.0), number, (8, 6)),
        "weight": 1.0,
        "broken": "",
    }


class TestFrozen:
    @pytest.mark.parametrize("kind", FEATURE_KINDS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_encodes_as_diffusers_pipelines_do(self, family, kind, folders):
        encoders = loaded(folders[family], kind)
        batch = collate([example(encoders, n) for n in range(3)])
        found = encoders.encode(batch)
        texts = [f"number {n}" for n in range(3)]
        kinds = StableDiffusionPipeline, StableDiffusionXLPipeline
        pipeline = kinds[FAMILIES.index(family)].from_pretrained(folders[family])
        expected = pipeline.encode_prompt(
            texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert close(found["states"], expected[0], 1e-6)
        if family == "sdxl":
            assert close(found["pooled"], expected[2], 1e-6)
        else:
            assert "pooled" not in found
        posterior = pipeline.vae.encode(batch["pixels"]).latent_dist
        assert found["mean"].shape == (3, 4, 8, 6)
        assert close(found["mean"], posterior.mean, 1e-6)
        assert close(found["log_variance"], posterior.logvar, 1e-6)
        assert torch.equal(found["features"], encoders.image_encoder(batch["reference"], kind))
        assert not any(x.requires_grad for x in found.values() if isinstance(x, torch.Tensor))

    def test_everything_else_of_the_batch_goes_through(self, folders):
        encoders = loaded(folders["sd15"])
        batch = collate([example(encoders, n) for n in range(2)])
        batch["pixels"].requires_grad_()
        found = encoders.encode(batch)
        assert not found["mean"].requires_grad
        through = set(batch) - {"pixels", "reference", "tokens"}
        assert set(found) == through | {"mean", "log_variance", "states", "features"}
        assert all(found[key] is batch[key] for key in through)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_stands_in_for_dropped_conditions(self, family, folders):
        encoders = loaded(folders[family])
        dropped = encoders.dropped()
        kinds = StableDiffusionPipeline, StableDiffusionXLPipeline
        pipeline = kinds[FAMILIES.index(family)].from_pretrained(folders[family])
        expected = pipeline.encode_prompt(
            "", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert close(dropped.states, expected[0], 1e-6)
        assert (dropped.pooled is None) == (family == "sd15")
        assert torch.equal(dropped.features, encoders.image_encoder.zero(EMBEDS))
        hidden = encoders.dropped(HIDDEN).features
        assert torch.equal(hidden, encoders.image_encoder.zero(HIDDEN))

    def test_captions_are_cut_and_filled_up(self, folders):
        encoders = loaded(folders["sdxl"])
        for text in ("", "x", "long " * 200):
            tokens = encoders.tokenise(text)
            assert [x.shape for x in tokens] == [(77,), (77,)]
            assert tokens[0].dtype == torch.int64
        sent = pickle.loads(pickle.dumps(encoders.tokenise))
        assert all(map(torch.equal, sent("a b"), encoders.tokenise("a b")))

    def test_a_vae_of_another_scale(self, folders, tmp_path):
        small_models.base(tmp_path, "sd15", levels=2)
        with pytest.raises(TrainingError, match="one latent of 2 × 2 pixels"):
            loaded(tmp_path)

    def test_texts_are_as_long_as_the_encoder_reads(self, folders):
        text = load_encoders(str(folders["sd15"])).text
        short = [(tokenizer, copy.deepcopy(encoder)) for tokenizer, encoder in text]
        short[0][1].config.max_position_embeddings = 12
        assert Tokenise(short)("word")[0].shape == (12,)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_captions_of_a_batch_are_read_once(family, folders):
    base = load_encoders(str(folders[family]))
    tokenise = Tokenise(base.text)
    captions = ["a b", "c", "a b", "", "c", "a b"]
    tokens = [torch.stack(ids) for ids in zip(*map(tokenise, captions), strict=True)]
    rows = []
    hooks = [
        encoder.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
        for _, encoder in base.text
    ]
    states, pooled = text_states(base.text, tokens)
    for hook in hooks:
        hook.remove()
    assert rows == [3] * len(base.text)
    for i in range(len(captions)):
        alone, alone_pooled = text_states(base.text, [ids[i : i + 1] for ids in tokens])
        assert torch.allclose(states[i], alone[0], atol=1e-5)
        assert (pooled is None) == (alone_pooled is None) == (family == "sd15")
        if pooled is not None:
            assert torch.allclose(pooled[i], alone_pooled[0], atol=1e-5)


class TestFingerprint:
    def test_it_does_not_depend_on_the_dtype(self, folders):
        found = {
            tuple(loaded(folders["sdxl"], dtype=dtype).fingerprints.values())
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        }
        assert len(found) == 1

    def test_it_names_the_part_that_is_another(self, folders):
        before = loaded(folders["sd15"])
        assert set(before.fingerprints) == {"vae", "text encoder", "image encoder"}
        other = small_models.open_clip_model()
        other.visual.ln_pre.bias.data[0] += 1e-6
        base = load_encoders(str(folders["sd15"]))
        after = FrozenEncoders(base, of_open_clip(other), EMBEDS)
        parts = before.fingerprints.items() ^ after.fingerprints.items()
        assert {part for part, _ in parts} == {"image encoder"}
        assert before.fingerprints != after.fingerprints

    def test_preprocessing_and_activation_count(self):
        plain = of_open_clip(small_models.open_clip_model())
        assert plain.weights == of_open_clip(small_models.open_clip_model()).weights
        assert plain.weights != of_open_clip(small_models.open_clip_model(quick_gelu=True)).weights
        other = small_models.preprocessed(small_models.open_clip_model(), mean=(0.5, 0.5, 0.5))
        assert plain.weights != of_open_clip(other).weights
        model = small_models.as_transformers(small_models.open_clip_model().visual)
        first = of_transformers(model)
        rescaled = image_encoder.Processor(
            size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
        )
        assert first.weights != of_transformers(model, rescaled).weights

    def test_shapes_and_order_count(self):
        one, other = torch.arange(6.0), torch.arange(6.0) + 1
        found = {
            fingerprints.of_weights(torch.nn.ParameterList(parameters))
            for parameters in (
                [one.view(2, 3), other],
                [one.view(3, 2), other],
                [other, one.view(2, 3)],
                [torch.cat([one, other])],
            )
        }
        assert len(found) == 4

    def test_text_towers_do_not_count(self):
        """Only the image tower shapes the features."""
        other = small_models.open_clip_model()
        other.ln_final.bias.data += 1
        plain = of_open_clip(small_models.open_clip_model())
        assert of_open_clip(other).weights == plain.weights
