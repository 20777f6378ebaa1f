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
def close(a, b):
    return float((a - b).norm() / b.norm()) < 1e-6


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


def prompts(pipeline, texts):
    """States and pooled texts, as the pipeline conditions on them; the latter None for SD1.5."""
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = pipeline.encode_prompt(texts, device="cpu", **options)
    return found[0], found[2] if len(found) > 2 else None


class TestFrozen:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_encodes_as_diffusers_pipelines_do(self, family, frozen):
        encoders = loaded(frozen / family)
        batch = collate([example(encoders, n) for n in range(3)])
        batch["pixels"].requires_grad_()
        found = encoders.encode(batch)
        kind = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
        pipeline = kind.from_pretrained(frozen / family)
        states, pooled = prompts(pipeline, [f"number {n}" for n in range(3)])
        assert close(found["states"], states)
        if pooled is not None:
            assert close(found.pop("pooled"), pooled)
        posterior = pipeline.vae.encode(batch["pixels"]).latent_dist
        assert found["mean"].shape == (3, 4, 8, 6)
        assert close(found["mean"], posterior.mean)
        assert close(found["log_variance"], posterior.logvar)
        given = {"mean", "log_variance", "states", "features"}
        assert not any(found[name].requires_grad for name in given)
        through = set(batch) - {"pixels", "reference", "tokens"}
        assert set(found) == through | given
        assert all(found[key] is batch[key] for key in through)

        dropped, (states, pooled) = encoders.dropped(), prompts(pipeline, "")
        assert close(dropped.states, states)
        assert (dropped.pooled is None) == (pooled is None) == (family == "sd15")
        for kind in FEATURE_KINDS:
            encoders.kind = kind
            expected = encoders.image_encoder(batch["reference"], kind)
            assert torch.equal(encoders.encode(batch)["features"], expected)
            assert torch.equal(encoders.dropped().features, encoders.image_encoder.zero(kind))

    def test_captions_are_cut_and_filled_up(self, frozen):
        encoders = loaded(frozen / "sdxl")
        for text in ("", "x", "long " * 200):
            tokens = encoders.tokenise(text)
            assert [x.shape for x in tokens] == [(77,), (77,)]
            assert tokens[0].dtype == torch.int64
        sent = pickle.loads(pickle.dumps(encoders.tokenise))
        assert all(map(torch.equal, sent("a b"), encoders.tokenise("a b")))
        short = [(tokenizer, copy.deepcopy(encoder)) for tokenizer, encoder in encoders.text]
        short[0][1].config.max_position_embeddings = 12
        assert [ids.shape for ids in Tokenise(short)("word")] == [(12,), (77,)]

    def test_a_vae_of_another_scale(self, frozen, tmp_path):
        small_models.base(tmp_path, "sd15", levels=2)
        with pytest.raises(TrainingError, match="one latent of 2 × 2 pixels"):
            loaded(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_captions_of_a_batch_are_read_once(family, frozen):
    base = load_encoders(str(frozen / family))
    captions = ["a b", "c", "a b", "", "c", "a b"]
    tokens = [torch.stack(ids) for ids in zip(*map(Tokenise(base.text), captions), strict=True)]
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
        if pooled is not None:
            assert torch.allclose(pooled[i], alone_pooled[0], atol=1e-5)


class TestFingerprint:
    def test_it_does_not_depend_on_the_dtype(self, frozen):
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        assert len({loaded(frozen / "sdxl", dtype=dtype).fingerprint for dtype in dtypes}) == 1

    def test_it_names_the_part_that_is_another(self, frozen):
        before = loaded(frozen / "sd15")
        assert set(before.fingerprints) == {"vae", "text encoder", "image encoder"}
        other = small_models.open_clip_model()
        other.visual.ln_pre.bias.data[0] += 1e-6
        after = FrozenEncoders(load_encoders(str(frozen / "sd15")), of_open_clip(other), EMBEDS)
        parts = before.fingerprints.items() ^ after.fingerprints.items()
        assert {part for part, _ in parts} == {"image encoder"}
        assert before.fingerprint != after.fingerprint

    def test_what_of_an_image_encoder_counts(self):
        plain = of_open_clip(small_models.open_clip_model()).weights
        other_text = small_models.open_clip_model()
        other_text.ln_final.bias.data += 1  # only the image tower shapes the features
        assert of_open_clip(other_text).weights == plain
        assert of_open_clip(small_models.open_clip_model(quick_gelu=True)).weights != plain
        other = small_models.preprocessed(small_models.open_clip_model(), mean=(0.5, 0.5, 0.5))
        assert of_open_clip(other).weights != plain
        model = small_models.as_transformers(small_models.open_clip_model().visual)
        rescaled = image_encoder.Processor(
            size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
        )
        assert of_transformers(model).weights != of_transformers(model, rescaled).weights

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
