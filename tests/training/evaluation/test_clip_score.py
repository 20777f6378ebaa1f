"""CLIP-I and CLIP-T are what a plain re-derivation makes of the same weights."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from tests.support import image_folders
from tests.support import small_models as small
from training.errors import TrainingError
from training.evaluation.clip_score import clip_i, clip_t, load_clip

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "two small birds on a long wire", "", "x" * 300, "a dog", "red, green, blue"]


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


def test_scores_of_an_open_clip_model(tmp_path, pictures):
    """Of weights in a file, and a model that open_clip is told about."""
    (tmp_path / "test-tiny.json").write_text(json.dumps(small.open_clip_config()))
    open_clip.add_model_config(tmp_path / "test-tiny.json")
    weights = tmp_path / "weights.pt"
    torch.save(small.fill(open_clip.create_model("test-tiny"), 9).state_dict(), weights)
    clip = load_clip(f"open_clip:test-tiny@{weights}", CPU)
    model, _, prepare = open_clip.create_model_and_transforms("test-tiny", str(weights))
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
