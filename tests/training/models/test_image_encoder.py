"""The image encoder gives what the libraries' own models give, whichever library it is of."""

from __future__ import annotations

import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ip_adapter_core.variants import FEATURE_KINDS
from tests.support import image_folders, small_models
from tests.support.small_models import of_open_clip, of_transformers
from training.errors import TrainingError
from training.models import image_encoder
from training.models.image_encoder import ImageEncoder

EMBEDS, HIDDEN = FEATURE_KINDS


@torch.no_grad()
def close(a, b, tolerance=1e-5):
    return float((a - b).norm() / b.norm()) < tolerance


def pixels(side=small_models.SIDE, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


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
        with pytest.raises(TrainingError, match="reads pictures of 32 pixels"):
            of_transformers(reference, image_encoder.Processor())
