"""CLIP-I and CLIP-T are what torchmetrics and a plain re-derivation make of the same weights."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from tests.support import image_folders
from tests.support import small_models as small
from training.errors import TrainingError
from training.evaluation.clip_score import clip_i, clip_t, load_clip

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "two small birds on a long wire", "", "x" * 300, "a dog", "red, green, blue"]
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def pictures():
    return [image_folders.image(seed, (50 + 9 * seed, 40)) for seed in range(len(CAPTIONS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    small.clip(path)
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(str(folder), CPU)


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory):
    """Weights of a model that open_clip is told about."""
    path = tmp_path_factory.mktemp("open_clip")
    (path / "test-tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(path / "test-tiny.json")
    model = small.fill(open_clip.create_model("test-tiny"), 9)
    torch.save(model.state_dict(), path / "weights.pt")
    return path / "weights.pt"


def cosines(a, b):
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_scores_of_a_transformers_model(folder, clip, pictures):
    """The whole way again in float64, one picture after the other."""
    model = CLIPModel.from_pretrained(folder).double()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images, texts = [], []
    for picture, caption in zip(pictures, CAPTIONS, strict=True):
        pixels = processor(images=picture, return_tensors="pt").pixel_values.double()
        ids = tokenizer(caption, truncation=True, max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=pixels)
        images.append(out.image_embeds[0])
        texts.append(out.text_embeds[0])
    found, told = clip.images(pictures), clip.texts(CAPTIONS)
    expected = cosines(torch.stack(images), torch.stack(images).roll(1, 0))
    assert torch.allclose(clip_i(found, found.roll(1, 0)), expected, atol=1e-5)
    expected = 2.5 * cosines(torch.stack(images), torch.stack(texts)).clamp(min=0)
    assert torch.allclose(clip_t(found, told), expected, atol=1e-5)
    assert len(expected[expected > 0]) > 0 and expected.std() > 0.01, "all alike: shows nothing"


def test_clip_t_is_torchmetrics(folder, clip, pictures):
    multimodal = pytest.importorskip("torchmetrics.functional.multimodal")

    class AsBefore(CLIPModel):
        """With the bare tensors that transformers 4 gave and torchmetrics expects."""

        def get_image_features(self, *args):
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args):
            return super().get_text_features(*args).pooler_output

    def model_and_processor():
        parts = CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        return AsBefore.from_pretrained(folder), CLIPProcessor(*parts)

    told = clip_t(clip.images(pictures), clip.texts(CAPTIONS))
    tensors = [torch.tensor([*p.tobytes()]).view(p.height, p.width, 3) for p in pictures]
    for score, tensor, caption in zip(told, tensors, CAPTIONS, strict=True):
        if len(caption) > 77:
            continue  # theirs loses the end token, from which CLIP reads the text
        theirs = multimodal.clip_score(
            tensor.permute(2, 0, 1).byte(), caption, model_name_or_path=model_and_processor
        )
        assert float(score) == pytest.approx(2.5 * float(theirs.detach()) / 100, abs=1e-5)


def test_scores_of_an_open_clip_model(open_clip_file, pictures):
    clip = load_clip(f"open_clip:test-tiny@{open_clip_file}", CPU)
    model, _, prepare = open_clip.create_model_and_transforms("test-tiny", str(open_clip_file))
    model = model.double()
    tokens = open_clip.get_tokenizer("test-tiny")(CAPTIONS)
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepare(p) for p in pictures]).double())
        texts = model.encode_text(tokens)
    found, told = clip.images(pictures), clip.texts(CAPTIONS)
    assert torch.allclose(clip_i(found, found.roll(1, 0)), cosines(images, images.roll(1, 0)))
    expected = 2.5 * cosines(images, texts).clamp(min=0)
    assert torch.allclose(clip_t(found, told), expected, atol=1e-5)


def test_values_at_the_ends():
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[-3.0, -4.0]])
    across = torch.tensor([[4.0, -3.0]])
    for picture, like, true in ((one, 1.0, 2.5), (other, -1.0, 0.0), (across, 0.0, 0.0)):
        assert float(clip_i(one, 5 * picture)) == pytest.approx(like)
        assert float(clip_t(one, 5 * picture)) == pytest.approx(true)


def test_batches_change_nothing(folder, clip, pictures):
    small_steps = load_clip(str(folder), CPU, batch=2)
    assert torch.allclose(small_steps.images(pictures), clip.images(pictures), atol=1e-6)
    assert torch.allclose(small_steps.texts(CAPTIONS), clip.texts(CAPTIONS), atol=1e-6)


def test_pictures_of_every_mode(clip):
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert clip.images([Image.new(mode, (20, 30))]).isfinite().all()


def test_fingerprint_is_of_the_weights(folder, clip, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    moved = load_clip(str(tmp_path / "moved"), CPU)
    assert moved.fingerprint() == clip.fingerprint()
    with torch.no_grad():
        moved.model.logit_scale += 1
    assert moved.fingerprint() != clip.fingerprint()


@pytest.mark.parametrize(
    "name, told",
    [
        ("open_clip:ViT-L-41/openai", "ViT-L-14"),
        ("open_clip:ViT-L-14/nobody", "openai"),
        ("open_clip:ViT-L-14@missing.pt", "missing.pt"),
        ("missing/folder/of/a/model", "openai/clip-vit-large-patch14"),
    ],
)
def test_models_that_are_not_there(name, told):
    with pytest.raises(TrainingError, match=told) as caught:
        load_clip(name, CPU)
    assert name in str(caught.value)


def test_a_folder_of_something_else(tmp_path):
    small.image_encoder(tmp_path)  # an image tower alone cannot read captions
    with pytest.raises(TrainingError, match="tokenizer"):
        load_clip(str(tmp_path), CPU)
