"""The frozen encoders give what the libraries' own models give, and say who they are."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from ip_adapter_core.variants import FAMILIES, FEATURE_KINDS
from tests.support import image_folders, small_models
from tests.support.small_models import of_open_clip, of_transformers
from training import fingerprints
from training.errors import TrainingError
from training.models import image_encoder
from training.models.base import load_encoders
from training.models.frozen import FrozenEncoders, Tokenise, text_states
from training.models.image_encoder import ImageEncoder

EMBEDS, HIDDEN = FEATURE_KINDS


@torch.no_grad()
def close(a, b, tolerance=1e-5):
    return float((a - b).norm() / b.norm()) < tolerance


def pixels(count=2):
    shape = (count, 3, small_models.SIDE, small_models.SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def loaded(folder, dtype=torch.float32):
    encoder = of_open_clip(small_models.open_clip_model()).to(dtype)
    return FrozenEncoders(load_encoders(str(folder), dtype), encoder, EMBEDS)


def tokens_of(tokenise, texts):
    return [torch.stack(ids) for ids in zip(*map(tokenise, texts), strict=True)]


def prompts(pipeline, texts):
    """States and pooled texts, as the pipeline conditions on them; the latter None for SD1.5."""
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = pipeline.encode_prompt(texts, device="cpu", **options)
    return found[0], found[2] if len(found) > 2 else None


class TestFrozen:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_encodes_as_diffusers_pipelines_do(self, family, frozen):
        encoders = loaded(frozen / family)
        texts = [f"number {n}" for n in range(3)]
        generator = torch.Generator().manual_seed(0)
        batch = {
            "pixels": torch.randn(3, 3, 64, 48, generator=generator, requires_grad=True),
            "reference": pixels(3),
            "tokens": tokens_of(encoders.tokenise, texts),
            "time_ids": torch.arange(18.0).view(3, 6),
            "broken": [],
        }
        found = encoders.encode(batch)
        assert not any(x.requires_grad for x in found.values() if isinstance(x, torch.Tensor))
        kind = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
        pipeline = kind.from_pretrained(frozen / family)
        states, pooled = prompts(pipeline, texts)
        assert close(found["states"], states, 1e-6)
        if pooled is not None:
            assert close(found.pop("pooled"), pooled, 1e-6)
        posterior = pipeline.vae.encode(batch["pixels"]).latent_dist
        assert found["mean"].shape == (3, 4, 8, 6)
        assert close(found["mean"], posterior.mean, 1e-6)
        assert close(found["log_variance"], posterior.logvar, 1e-6)
        through = set(batch) - {"pixels", "reference", "tokens"}
        assert set(found) == through | {"mean", "log_variance", "states", "features"}
        assert all(found[key] is batch[key] for key in through)

        dropped, (states, pooled) = encoders.dropped(), prompts(pipeline, "")
        assert close(dropped.states, states, 1e-6)
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
    tokens = tokens_of(Tokenise(base.text), captions)
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
        found = [loaded(frozen / "sdxl", dtype=dtype).fingerprints for dtype in dtypes]
        assert all(parts == found[0] for parts in found)

    def test_it_names_the_part_that_is_another(self, frozen):
        before = loaded(frozen / "sd15")
        assert set(before.fingerprints) == {"vae", "text encoder", "image encoder"}
        other = small_models.open_clip_model()
        other.visual.ln_pre.bias.data[0] += 1e-6
        after = FrozenEncoders(load_encoders(str(frozen / "sd15")), of_open_clip(other), EMBEDS)
        parts = before.fingerprints.items() ^ after.fingerprints.items()
        assert {part for part, _ in parts} == {"image encoder"}
        assert before.fingerprints != after.fingerprints

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


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """A small model among open_clip's, with weights under two tags that ask for either GELU."""
    known = open_clip.factory._MODEL_CONFIGS | {"small": small_models.open_clip_config()}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    weights = tmp_path / "small.safetensors"
    model = small_models.open_clip_model()
    save(model, weights)
    tags = {
        "plain": {"file": str(weights), "mean": (0.1, 0.2, 0.3)},
        "quick": {"file": str(weights), "quick_gelu": True},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", tags)
    return model, weights


def save(model, path):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)


@pytest.fixture(params=["open_clip", "transformers"])
def encoder(request):
    model = small_models.open_clip_model()
    if request.param == "open_clip":
        return of_open_clip(model)
    return of_transformers(small_models.as_transformers(model.visual))


class TestFeatures:
    @pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
    def test_both_libraries_give_the_same(self, quick_gelu):
        model = small_models.open_clip_model(quick_gelu=quick_gelu)
        reference = small_models.as_transformers(model.visual)
        mine, theirs = of_open_clip(model), of_transformers(reference)
        expected = reference(pixel_values=pixels(), output_hidden_states=True)
        for encoder in (mine, theirs):
            assert close(encoder(pixels(), EMBEDS), expected.image_embeds)
            assert close(encoder(pixels(), HIDDEN), expected.hidden_states[-2])
            assert encoder(pixels(), HIDDEN).shape == (2, 17, 64)
        assert close(mine(pixels(), EMBEDS), model.encode_image(pixels()))

    def test_both_kinds_at_once_are_those_of_each_alone(self, encoder):
        both = encoder.features(pixels(), FEATURE_KINDS)
        for kind in FEATURE_KINDS:
            alone = encoder.features(pixels(), [kind])
            assert list(alone) == [kind]
            assert torch.equal(alone[kind], both[kind])
        with pytest.raises(ValueError, match="image_embeds or penultimate_hidden_states"):
            encoder(pixels(), "hidden_states")

    def test_a_dropped_image(self, encoder):
        assert torch.equal(encoder.zero(EMBEDS), torch.zeros(1, 48))
        assert torch.equal(encoder.zero(HIDDEN), encoder(torch.zeros_like(pixels(count=1)), HIDDEN))
        assert encoder.zero(HIDDEN).abs().sum() > 0
        assert (encoder.feature_dim(EMBEDS), encoder.feature_dim(HIDDEN)) == (48, 64)

    def test_it_stays_frozen(self, encoder):
        encoder.to(torch.bfloat16)
        assert not encoder.train().training
        assert not any(part.training for part in encoder.modules())
        out = encoder(pixels(), HIDDEN)
        assert (out.dtype, out.requires_grad) == (torch.bfloat16, False)
        assert encoder.zero(EMBEDS).dtype == torch.bfloat16

    def test_a_tower_without_such_states(self):
        config = small_models.open_clip_config()
        config["vision_cfg"] |= {"layers": [1, 1, 1, 1], "width": 16}
        model = open_clip.model.CLIP(**config).eval()
        encoder = of_open_clip(small_models.preprocessed(model))
        assert encoder(pixels(), EMBEDS).shape == (2, 48)
        with pytest.raises(TrainingError, match="ModifiedResNet"):
            encoder(pixels(), HIDDEN)


class TestPreprocess:
    @pytest.mark.parametrize(
        "size", [(224, 224), (37, 53), (225, 640), (640, 427), (301, 224), (1000, 333)]
    )
    def test_both_libraries_agree(self, size):
        """But for one place: an odd remainder is cropped by torchvision at the nearest pixel
        (halves to even), by transformers at the one before."""
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        config = {"size": 224, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        model = small_models.preprocessed(small_models.open_clip_model(), **config)
        _, mine = image_encoder.of_open_clip(model)
        processor = image_encoder.Processor(
            size={"shortest_edge": 224},
            crop_size={"height": 224, "width": 224},
            image_mean=config["mean"],
            image_std=config["std"],
        )
        _, theirs = image_encoder.of_transformers(
            small_models.as_transformers(model.visual), processor
        )
        a, b = mine(picture), theirs(picture)
        assert a.shape == b.shape == (3, 224, 224)
        assert a.dtype == b.dtype == torch.float32
        short, long = sorted(size)
        left_over = 224 * long // short - 224
        if left_over % 4 == 3:
            dim = 2 if size[0] > size[1] else 1
            a, b = a.narrow(dim, 0, 223), b.narrow(dim, 1, 223)
        assert (a - b).abs().max() < 1e-5

    def test_greyscale(self, encoder):
        grey = Image.new("L", (50, 40), 130)
        assert torch.equal(encoder.preprocess(grey), encoder.preprocess(grey.convert("RGB")))

    def test_it_goes_to_other_processes_without_the_weights(self, encoder):
        sent = pickle.dumps(encoder.preprocess)
        assert len(sent) < 10_000
        picture = image_folders.image(0)
        assert torch.equal(pickle.loads(sent)(picture), encoder.preprocess(picture))


class TestOpenClip:
    def test_by_tag(self, registered):
        model, _ = registered
        encoder = ImageEncoder.from_name("open_clip:small/plain", torch.bfloat16)
        assert encoder.dtype == torch.bfloat16
        wide = encoder.to(torch.float32)
        assert close(wide(pixels(), EMBEDS), model.visual(pixels()), 1e-2)
        assert encoder.preprocess.settings["mean"] == (0.1, 0.2, 0.3)

    def test_weights_decide_about_the_activation(self, registered, recwarn):
        plain = ImageEncoder.from_name("open_clip:small/plain")
        quick = ImageEncoder.from_name("open_clip:small/quick")
        reference = small_models.open_clip_model(quick_gelu=True)
        assert torch.equal(quick(pixels(), EMBEDS), reference.visual(pixels()))
        assert not torch.equal(quick(pixels(), EMBEDS), plain(pixels(), EMBEDS))
        assert quick.weights != plain.weights
        assert not [w for w in recwarn if "GELU" in str(w.message)]

    @pytest.mark.parametrize(
        ("name", "quick"),
        [
            ("ViT-L-14/openai", True),
            ("ViT-H-14/dfn5b", True),
            ("ViT-H-14/laion2b_s32b_b79k", False),
            ("ViT-bigG-14/laion2b_s39b_b160k", False),
        ],
    )
    def test_published_names_that_need_quick_gelu(self, name, quick):
        model, tag, settings = image_encoder.parsed_name(f"open_clip:{name}")
        assert (f"{model}/{tag}", settings) == (name, {"quick_gelu": quick})

    def test_weights_of_a_file_or_folder(self, registered, tmp_path):
        model, weights = registered
        config = {"model_cfg": small_models.open_clip_config(), "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        (tmp_path / "open_clip_model.safetensors").write_bytes(weights.read_bytes())
        for name in (f"small@{weights}", f"local-dir:{tmp_path}"):
            encoder = ImageEncoder.from_name(f"open_clip:{name}")
            for kind in FEATURE_KINDS:
                assert torch.equal(encoder(pixels(), kind), of_open_clip(model)(pixels(), kind))

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("open_clip:ViT-H14/laion2b_s32b_b79k", r"Alike are: .*ViT-H-14"),
            ("open_clip:ViT-H-14/laion", r"no weights 'laion'.*laion2b_s32b_b79k"),
            ("open_clip:ViT-H-14", r"no weights ''.*laion2b_s32b_b79k"),
            ("open_clip:ViT-H-14@/nowhere/file.pt", "there is no file '/nowhere/file.pt'"),
            ("open_clip:local-dir:/nowhere", "cannot be loaded by open_clip"),
            ("/nowhere/folder", "Expected the folder or hub id"),
        ],
    )
    def test_a_name_that_there_is_not(self, name, said, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(TrainingError, match=said):
            ImageEncoder.from_name(name)

    def test_weights_of_another_model(self, registered, tmp_path):
        save(small_models.open_clip_model(width=32), tmp_path / "other.safetensors")
        with pytest.raises(TrainingError, match=r"cannot be loaded by open_clip.*size mismatch"):
            ImageEncoder.from_name(f"open_clip:small@{tmp_path / 'other.safetensors'}")


class TestTransformers:
    def test_a_folder(self, tmp_path):
        small_models.image_encoder(tmp_path)
        encoder = ImageEncoder.from_name(str(tmp_path), torch.float16)
        assert (encoder.dtype, encoder.size) == (torch.float16, 32)
        assert encoder.feature_dim(EMBEDS) == small_models.EMBED
        assert encoder.feature_dim(HIDDEN) == small_models.STATES
        picture = image_folders.image(1)
        expected = encoder.preprocess(picture)
        (tmp_path / "preprocessor_config.json").unlink()  # then its size is the model's
        assert torch.equal(ImageEncoder.from_name(str(tmp_path)).preprocess(picture), expected)

    def test_a_folder_with_both_towers(self, tmp_path):
        small_models.clip(tmp_path)
        assert ImageEncoder.from_name(str(tmp_path)).feature_dim(EMBEDS) == small_models.EMBED

    def test_a_model_without_projection(self, tmp_path):
        small_models.image_encoder(tmp_path)
        (path,) = tmp_path.glob("*.safetensors")
        state = load_file(path)
        del state["visual_projection.weight"]
        save_file(state, path, {"format": "pt"})
        with pytest.raises(TrainingError, match=r"incomplete.*visual_projection\.weight"):
            ImageEncoder.from_name(str(tmp_path))

    def test_a_model_of_another_type(self, tmp_path):
        small_models.second_text_encoder().save_pretrained(tmp_path)
        with pytest.raises(TrainingError, match="type 'clip_text_model'"):
            ImageEncoder.from_name(str(tmp_path))

    def test_preprocessing_of_another_size(self):
        reference = small_models.as_transformers(small_models.open_clip_model().visual)
        with pytest.raises(TrainingError, match="reads images of 32 pixels"):
            of_transformers(reference, image_encoder.Processor())
