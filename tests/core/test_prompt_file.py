"""Image prompts as files: to the bit, and every file that is none is refused by name."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.image_prompt import (
    ImageFeatures,
    ImagePrompt,
    describe_encoder,
)
from comfyui_ip_adapter.ip_adapter_core.prompt_file import KEYS, PromptFileError, load, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TEXT = 'a test encoder "of" ümläuts'


def features(images, embed=12, states=(5, 20)):
    """Numbers that decimals would not keep, and those at the ends of float32."""
    states = torch.randn(images, *states, generator=torch.Generator().manual_seed(images))
    if states.numel():
        states[0, 0, :4] = torch.tensor([1e-45, -0.0, 3.4028235e38, 1 / 3])
    embeds = torch.randn(images, embed, generator=torch.Generator().manual_seed(images + 1))
    return ImageFeatures(embeds, states)


def prompt(images=2, negatives=1, **sizes):
    return ImagePrompt(features(images, **sizes), features(negatives, **sizes), TEXT, "0123abcd")


def bits(prompt):
    sides = prompt.positive, prompt.negative
    kinds = ("image_embeds", "penultimate_hidden_states")
    return [getattr(s, k).contiguous().view(torch.int32) for s in sides for k in kinds]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompt.safetensors"


VIEWS = ImageFeatures(torch.randn(2, 24)[:, ::2], torch.randn(20, 5, 2).permute(2, 1, 0))
GIVEN = {
    "one image": prompt(1),
    "several": prompt(3, 2),
    "no embeddings": prompt(1, embed=0),
    "no states": prompt(2, states=(0, 0)),
    "sides that share memory": ImagePrompt(*[features(2)] * 2, TEXT),
    "views": ImagePrompt(VIEWS, VIEWS, TEXT),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_it_comes_back_to_the_bit(path, given):
    save(given, path)
    found = load(path)
    assert (found.encoder, found.fingerprint) == (given.encoder, given.fingerprint)
    for one, other in zip(bits(found), bits(given), strict=True):
        assert one.shape == other.shape and torch.equal(one, other)


def test_what_the_file_says(path):
    save(prompt(), path, {"workflow": "{}"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["image_prompt_format"] == "2"
    assert (metadata["encoder"], metadata["encoder_fingerprint"]) == (TEXT, "0123abcd")
    assert metadata["workflow"] == "{}"
    assert sorted(load_file(path)) == sorted(KEYS)


def test_a_prompt_outlives_its_file(path):
    """On Windows a file that is in use could not be replaced, elsewhere it would change."""
    save(prompt(), path)
    found = load(path)
    before = [x.clone() for x in bits(found)]
    path.write_bytes(bytes(path.stat().st_size))  # in place
    assert all(map(torch.equal, bits(found), before))


def test_it_is_never_half_written(path, monkeypatch):
    def interrupted(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(PromptFileError, match=r"prompt\.safetensors.*No space left"):
        save(prompt(3), path)
    assert os.listdir(path.parent) == []


def test_no_file_is_overwritten(path):
    save(prompt(1), path)
    whole = path.read_bytes()
    with pytest.raises(FileExistsError):
        save(prompt(3), path)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]


def test_of_many_at_once_one_gets_the_name(path):
    """Each its own file beside it meanwhile, so that no one writes into another's."""
    prompts = [prompt(1 + i) for i in range(8)]

    def saved(given):
        try:
            save(given, path)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(saved, prompts))
    assert sum(first) == 1
    found, expected = bits(load(path)), bits(prompts[first.index(True)])
    assert all(map(torch.equal, found, expected))
    assert os.listdir(path.parent) == [path.name]


def test_fingerprints_of_the_first_format_are_not_compared(path):
    save(prompt(), path)
    rewritten(image_prompt_format="1")(path)
    found = load(path)
    assert (found.encoder, found.fingerprint) == (TEXT, "")
    assert all(map(torch.equal, bits(found), bits(prompt())))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(PromptFileError, match="cannot be written"):
        save(prompt(), tmp_path / "none" / "prompt.safetensors")


def rewritten(change_tensors=None, **metadata):
    def spoil(path):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            known = {**file.metadata(), **metadata}
        if change_tensors:
            change_tensors(tensors)
        save_file(tensors, path, {k: v for k, v in known.items() if v is not None})

    return spoil


def entry(key, change):
    def change_tensors(tensors):
        tensors[key] = change(tensors[key]).contiguous()

    return rewritten(change_tensors)


def put(value):
    def change(x):
        x.view(-1)[3] = value
        return x

    return change


EMBEDS, STATES = KEYS[:2]
BAD = {
    "empty": (lambda p: p.write_bytes(b""), "no whole safetensors file"),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "no whole.*cut short"),
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:50]), "no whole"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"abcd"), "no whole"),
    "a web page": (lambda p: p.write_text("<!doctype html><html>"), "no whole"),
    "a picture": (lambda p: p.write_bytes(b"\x89PNG\r\n" + bytes(99)), "no whole"),
    "a model": (
        lambda p: save_file({"proj.weight": torch.ones(2)}, p),
        "no image prompt.*1 tensors: proj.weight",
    ),
    "without its encoder": (rewritten(encoder=None), "no image prompt.*'encoder'"),
    "of a later format": (rewritten(image_prompt_format="3"), "format '3'; expected '2'.*update"),
    "without a tensor": (rewritten(lambda t: t.pop(STATES)), "holds the tensors.*expected.*Save"),
    "with another tensor": (rewritten(lambda t: t.update(a=torch.ones(1))), "holds the tensors a,"),
    "of half precision": (entry(EMBEDS, lambda x: x.half()), "stored as torch.float16.*float32"),
    "of another shape": (
        entry(STATES, lambda x: x[0]),
        r"shape \[5, 20\]; expected \[images, patches, width\]",
    ),
    "of no image": (entry(EMBEDS, lambda x: x[:0]), r"shape \[0, 12\].*at least one image"),
    "of other numbers": (
        entry(EMBEDS, lambda x: x[:1]),
        "positive has embeddings of 1 images and hidden states of 2",
    ),
    "of two widths": (
        entry(KEYS[3], lambda x: x[..., 1:]),
        r"\[2, 5, 20\] on the positive and \[1, 5, 19\] on the negative side",
    ),
    "NaN": (entry(EMBEDS, put(float("nan"))), "'positive.image_embeds' contains NaN"),
    "infinite": (entry(KEYS[3], put(float("inf"))), "'negative.penult.*infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name(path, case):
    save(prompt(), path)
    load(path)
    spoil, said = BAD[case]
    spoil(path)
    with pytest.raises(PromptFileError, match=f"(?s)'prompt.safetensors'.*{said}"):
        load(path)


def test_a_missing_file_and_a_folder(tmp_path):
    for place in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(PromptFileError, match=f"{place}.*cannot be read"):
            load(place)


def test_features_that_are_not_finite_are_not_saved(path):
    given = prompt()
    given.positive.image_embeds[0, 0] = float("nan")
    with pytest.raises(PromptFileError, match=r"NaN.*Encode the image again.*weights are damaged"):
        save(given, path)
    assert not path.exists()


@pytest.mark.parametrize(
    "embed, hidden, size, name",
    [
        (768, 1024, 224, "CLIP ViT-L/14, 224 px"),
        (768, 1024, 336, "CLIP ViT-L/14, 336 px"),
        (1024, 1280, 224, "CLIP ViT-H/14, 224 px"),
        (1280, 1664, 224, "CLIP ViT-bigG/14, 224 px"),
        (0, 1280, 224, None),
        (768, 1280, 224, None),
    ],
)
def test_published_encoders_go_by_their_names(embed, hidden, size, name):
    patches = (size // 14) ** 2 + 1
    made = ImageFeatures(torch.empty(1, embed), torch.empty(1, patches, hidden))
    said = describe_encoder(made, size)
    assert said == (
        f"an image encoder of {hidden}-wide hidden states and {embed}-wide embeddings "
        f"({name or f'{size} px'})"
    )
    fewer = ImageFeatures(made.image_embeds, made.penultimate_hidden_states[:, 1:])
    assert "CLIP" not in describe_encoder(fewer, size)
    quick = describe_encoder(made, size, quick_gelu=True)
    assert (quick == said) is (name is None or "ViT-L" in name)
    assert quick == said or "but quick GELU" in quick
