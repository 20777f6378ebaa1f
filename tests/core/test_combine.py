"""Combining image prompts: the arithmetic in numpy and float64, numbers of images, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.combine import METHODS, combine, parse_weights
from comfyui_ip_adapter.ip_adapter_core.image_prompt import ImageFeatures, ImagePrompt

KINDS = ("image_embeds", "penultimate_hidden_states")
ARITHMETIC = [method for method in METHODS if method != "concat"]


def features(images, seed, embed=12, hidden=20, patches=7):
    generator = torch.Generator().manual_seed(seed)
    shapes = (images, embed), (images, patches, hidden)
    return ImageFeatures(*(torch.randn(shape, generator=generator) for shape in shapes))


def prompt(images=1, seed=0, negative=99, encoder="a test encoder", fingerprint="abc", **sizes):
    sides = features(images, seed, **sizes), features(1, negative, **sizes)
    return ImagePrompt(*sides, encoder, fingerprint)


def given(*prompts):
    return {f"prompt{i}": prompt for i, prompt in enumerate(prompts)}


def arrays(features):
    return [getattr(features, kind).numpy().astype(np.float64) for kind in KINDS]


def unit(x):
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0), length


def truth(method, stacked, weights):
    """`stacked (prompts, N, …)`."""
    w = np.asarray(weights, np.float64).reshape(-1, *[1] * (stacked.ndim - 1))
    if method == "add":
        return (w * stacked).sum(0)
    if method == "subtract":
        return w[0] * stacked[0] - (w[1:] * stacked[1:]).sum(0)
    if method in ("max", "min"):
        return getattr(w * stacked, method)(0)
    if method == "average":
        return (w * stacked).sum(0) / w.sum()
    directions, lengths = unit(stacked)
    return unit((w * directions).sum(0) / w.sum())[0] * (w * lengths).sum(0) / w.sum()


@pytest.mark.parametrize("method", ARITHMETIC)
@pytest.mark.parametrize(
    "weights, numbers",
    [
        ([1, 1, 1], (1, 1, 1)),
        ([1, 0.5, 2.5], (1, 1, 1)),
        ([1.0, -0.3, 0.1], (1, 1, 1)),
        ([0.3, 0, 0], (1, 1, 1)),
        # One image goes with each of several.
        ([1.0, 0.25], (3, 3)),
        ([1.0, 0.25], (1, 3)),
        ([1.0, 0.25], (3, 1)),
        ([1.0, 0.25, 0.5], (1, 4, 1)),
    ],
)
def test_arithmetic_is_that_of_float64(method, weights, numbers):
    prompts = [prompt(images, seed) for seed, images in enumerate(numbers)]
    made = combine(given(*prompts), method, weights)
    sides = [arrays(prompt.positive) for prompt in prompts]
    for index, found in enumerate(arrays(made.positive)):
        one_kind = [side[index] for side in sides]
        stacked = np.stack([np.broadcast_to(x, (max(numbers), *x.shape[1:])) for x in one_kind])
        expected = truth(method, stacked, weights)
        assert found.shape == expected.shape
        # Rounded once: half a unit of float32 in the last place.
        np.testing.assert_allclose(found, expected, rtol=6.1e-8, atol=1e-12)
    assert made.positive.image_embeds.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_one_prompt_alone(method):
    alone = prompt(2)
    made = combine(given(alone), method, [1.0])
    for kind in KINDS:
        found, expected = (getattr(p.positive, kind) for p in (made, alone))
        if method == "norm_average":
            torch.testing.assert_close(found, expected, rtol=3e-7, atol=1e-9)
        else:
            assert torch.equal(found, expected)
        assert torch.equal(getattr(made.negative, kind), getattr(alone.negative, kind))


@pytest.mark.parametrize("negatives, kept", [((5, 5, 5), 1), ((5, 6, 5), 2), ((5, 6, 7), 3)])
def test_concat_puts_images_side_by_side_and_keeps_equal_negatives_once(negatives, kept):
    prompts = [prompt(1 + i, i, negative) for i, negative in enumerate(negatives)]
    made = combine(given(*prompts), "concat", [1.0] * 3)
    assert (len(made.positive), len(made.negative)) == (6, kept)
    for kind in KINDS:
        truth = torch.cat([getattr(p.positive, kind) for p in prompts])
        assert torch.equal(getattr(made.positive, kind), truth)
        truth = torch.cat([getattr(features(1, n), kind) for n in dict.fromkeys(negatives)])
        assert torch.equal(getattr(made.negative, kind), truth)


@pytest.mark.parametrize("method", ARITHMETIC)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.1, -0.7, 0.3], [0.0, 0.1, 0.0]])
def test_equal_negatives_come_out_to_the_bit(method, weights):
    prompts = [prompt(1, i) for i in range(3)]
    made = combine(given(*prompts), method, weights)
    for kind in KINDS:
        assert torch.equal(getattr(made.negative, kind), getattr(prompts[0].negative, kind))


@pytest.mark.parametrize("method", ARITHMETIC)
def test_other_negatives_are_averaged_by_the_weights_size(method):
    prompts = [prompt(1, i, negative=50 + i) for i in range(2)]
    made = combine(given(*prompts), method, [1.0, -0.25])
    for index, found in enumerate(arrays(made.negative)):
        one, other = (arrays(p.negative)[index] for p in prompts)
        np.testing.assert_allclose(found, (one + 0.25 * other) / 1.25, rtol=6.1e-8, atol=1e-12)


def test_weights_of_nothing_average_negatives_evenly():
    prompts = [prompt(1, i, negative=50 + i) for i in range(2)]
    made = combine(given(*prompts), "add", [0.0, 0.0])
    assert not made.positive.image_embeds.any()
    one, other = (arrays(p.negative)[0] for p in prompts)
    np.testing.assert_allclose(arrays(made.negative)[0], (one + other) / 2, rtol=6.1e-8)


def test_norm_average_of_zero_vectors():
    zero = ImageFeatures(torch.zeros(1, 12), torch.zeros(1, 7, 20))
    nothing = ImagePrompt(zero, zero, "a test encoder", "abc")
    both = combine(given(nothing, nothing), "norm_average", [1.0, 1.0])
    assert not both.positive.image_embeds.any()
    made = combine(given(prompt(), nothing), "norm_average", [1.0, 1.0])
    torch.testing.assert_close(made.positive.image_embeds, prompt().positive.image_embeds / 2)


def test_an_encoder_without_embeddings():
    prompts = [prompt(1, i, embed=0) for i in range(2)]
    for method in METHODS:
        made = combine(given(*prompts), method, [1.0, 1.0])
        assert made.positive.image_embeds.shape == (2 if method == "concat" else 1, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "known, expected", [(("abc", "abc"), "abc"), (("", "abc"), ""), (("abc", ""), "")]
)
def test_the_encoder_is_passed_on(method, known, expected):
    prompts = [prompt(seed=i, fingerprint=f) for i, f in enumerate(known)]
    made = combine(given(*prompts), method, [1, 1])
    assert (made.encoder, made.fingerprint) == ("a test encoder", expected)


def test_two_known_encoders_beside_an_unknown_one():
    prompts = [prompt(seed=i, fingerprint=f) for i, f in enumerate(("", "abc", "def"))]
    with pytest.raises(ValueError, match=r"prompt1 .*abc, prompt2 .*def\."):
        combine(given(*prompts), "concat", [1, 1, 1])


def test_prompts_are_left_as_they_were():
    prompts = [prompt(1, i) for i in range(2)]
    combine(given(*prompts), "average", [1.0, 2.0])
    for i, p in enumerate(prompts):
        assert torch.equal(p.positive.image_embeds, features(1, i).image_embeds)


OTHERS = {
    "fingerprint": {"fingerprint": "def"},
    "name": {"fingerprint": "", "encoder": "another encoder"},
    "widths": {"hidden": 24},
    "patches": {"patches": 8},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", OTHERS)
def test_prompts_of_different_encoders(method, case):
    other = prompt(1, 1, **OTHERS[case])
    with pytest.raises(ValueError) as error:
        combine(given(prompt(), other), method, [1.0, 1.0])
    said = str(error.value)
    for words in ("different encoders", "prompt0 was made with a test encoder", "fingerprint abc"):
        assert words in said
    assert f"prompt1 with {other.encoder}" in said
    assert (f"fingerprint {other.fingerprint}" if other.fingerprint else "no fingerprint") in said


@pytest.mark.parametrize("names", [("one", "other"), ("same", "same")])
def test_the_fingerprint_decides_where_both_have_one(names):
    prompts = [prompt(1, i, encoder=name) for i, name in enumerate(names)]
    assert len(combine(given(*prompts), "concat", [1.0, 1.0]).positive) == 2


@pytest.mark.parametrize("method", ARITHMETIC)
@pytest.mark.parametrize("side", ["images", "negative images"])
def test_other_numbers_of_images(method, side):
    two, three = prompt(2, 1), prompt(3, 2)
    if side == "negative images":
        two, three = (
            ImagePrompt(features(1, 0), p.positive, p.encoder, p.fingerprint) for p in (two, three)
        )
    said = f"^{method} goes image by image, but found {side}.*2 in prompt0, 3 in prompt1.*concat"
    with pytest.raises(ValueError, match=said):
        combine(given(two, three), method, [1.0, 1.0])


@pytest.mark.parametrize(
    "text, expected",
    [("", [1, 1]), (" \n", [1, 1]), ("1,0.5", [1, 0.5]), (" -1 ,\n2e-1 ", [-1, 0.2])],
)
def test_weights_as_text(text, expected):
    assert parse_weights(text, 2) == expected


@pytest.mark.parametrize(
    "text, said",
    [
        ("1", r"1 numbers \(1\), but 2 image prompts"),
        ("1, 2, 3", r"3 numbers \(1, 2, 3\), but 2 image prompts"),
        ("1, much", "'much' in place 2; expected a finite number"),
        ("1 2", "'1 2' in place 1"),
        ("1,", "'' in place 2"),
        ("nan, 1", "'nan' in place 1"),
        ("1, inf", "'inf' in place 2"),
    ],
)
def test_weights_as_text_that_cannot_be(text, said):
    with pytest.raises(ValueError, match=said):
        parse_weights(text, 2)


NO_SUM = "divides by the sum of weights, which is 0"


@pytest.mark.parametrize(
    "method, weights, said",
    [
        *(
            (method, weights, f"{method} {NO_SUM}")
            for method in ("average", "norm_average")
            for weights in ([0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.1, 0.2, -0.3])
        ),
        ("concat", [1.0, 0.5], r"weights must all be 1; found 1, 0\.5"),
        ("add", [1e300, 1.0], r"add with weights 1e\+300, 1 leaves the range"),
        ("add", [1.0, 3.14, 2.0], "3 weights for 2"),
        ("average", [], "No image prompt is connected"),
        ("mode", [1.0], "'mode'; expected one of concat, average"),
    ],
)
def test_weights_and_methods_that_cannot_be(method, weights, said):
    count = 2 if "for 2" in said else len(weights)
    with pytest.raises(ValueError, match=said):
        combine(given(*(prompt(1, i) for i in range(count))), method, weights)
