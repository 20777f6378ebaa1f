"""IPA_CombinePrompts, IPA_NegativeNoise and what IPA_EncodeImage makes of encoders, as nodes."""

from __future__ import annotations

import pytest
import torch

KINDS = ("image_embeds", "penultimate_hidden_states")


@pytest.fixture
def encode(nodes):
    def encode(encoder, image, negative=None):
        return nodes["IPA_EncodeImage"].execute(encoder, image, "center", negative).args[0]

    return encode


@pytest.fixture
def combine(nodes):
    execute = nodes["IPA_CombinePrompts"].execute
    return lambda prompts, method="concat", weights="": execute(prompts, method, weights).args[0]


@pytest.fixture
def another(clip_vision, small):
    """An image encoder of the same shapes, with other weights."""
    from comfy.clip_vision import ClipVisionModel

    made = ClipVisionModel(clip_vision.config)
    small.fill(made.model.requires_grad_(False), seed=41)
    return made


def pictures(count, seed=0):
    return torch.rand(count, 28, 28, 3, generator=torch.Generator().manual_seed(seed))


def test_concat_is_the_batch(encode, combine, clip_vision):
    both = pictures(3)
    apart = {"prompt0": encode(clip_vision, both[:1]), "prompt1": encode(clip_vision, both[1:])}
    made, whole = combine(apart), encode(clip_vision, both)
    assert (made.encoder, made.fingerprint) == (whole.encoder, whole.fingerprint)
    for kind in KINDS:
        found, truth = (getattr(p.positive, kind) for p in (made, whole))
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)
        assert torch.equal(getattr(made.negative, kind), getattr(whole.negative, kind))


def test_weights_follow_the_sockets(small, combine):
    """A workflow for the server may name sockets in any order, and leave some out."""
    prompts = {f"prompt{i}": small.images(seed=i) for i in (11, 2, 0)}
    made = combine(prompts, "add", "1, 10, 100")
    one, two, three = (prompts[f"prompt{i}"].positive.image_embeds for i in (0, 2, 11))
    torch.testing.assert_close(made.positive.image_embeds, one + 10 * two + 100 * three)


def test_the_activation_goes_into_the_description(encode, clip_vision, monkeypatch):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import encode as module

    monkeypatch.setattr(module, "describe_encoder", lambda *given: f"quick: {given[-1]}")
    assert encode(clip_vision, pictures(1)).encoder == "quick: False"
    monkeypatch.setitem(clip_vision.config, "hidden_act", "quick_gelu")
    assert encode(clip_vision, pictures(1)).encoder == "quick: True"


def test_encoders_of_equal_shapes_are_told_apart(encode, combine, clip_vision, another):
    one, other = (encode(encoder, pictures(1)) for encoder in (clip_vision, another))
    assert one.encoder == other.encoder
    assert one.fingerprint != other.fingerprint
    with pytest.raises(ValueError) as error:
        combine({"prompt0": one, "prompt1": other}, "average")
    for words in (one.encoder, one.fingerprint[:12], other.fingerprint[:12], "prompt0", "prompt1"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_act": "quick_gelu"},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.5]},
    ],
)
def test_other_settings_of_the_same_weights_are_another_encoder(encode, clip_vision, changed):
    from comfy.clip_vision import ClipVisionModel

    made = ClipVisionModel({**clip_vision.config, **changed})
    made.model.load_state_dict(clip_vision.get_sd())
    one, other = (encode(encoder, pictures(1)) for encoder in (clip_vision, made))
    assert one.encoder == other.encoder
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "damaged",
    ["visual_projection.weight", "vision_model.embeddings.position_embedding.weight"],
)
def test_a_damaged_encoder_is_named(encode, another, value, damaged):
    known = encode(another, pictures(1)).encoder
    another.model.get_parameter(damaged).data.view(-1)[7] = value
    with pytest.raises(ValueError, match=r"NaN or infinite.*weights are damaged") as error:
        encode(another, pictures(1))
    assert known in str(error.value)


def test_noise_stands_against_the_image(nodes, encode, clip_vision, small):
    execute = nodes["IPA_NegativeNoise"].execute
    (noise,) = execute(pictures(1), "shuffle", 1.0, 0.0, 5).args
    assert torch.equal(noise, execute(pictures(1), "shuffle", 1.0, 0.0, 5).args[0])
    prompt = encode(clip_vision, pictures(1), noise)
    for kind in KINDS:
        truth = getattr(encode(clip_vision, noise).positive, kind)
        assert torch.equal(getattr(prompt.negative, kind), truth)
