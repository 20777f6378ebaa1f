"""Image prompts on conditionings that other nodes calculate with."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch


@pytest.fixture
def prompted(small):
    """Two texts, each with an image of its own; the model that understands them; a negative."""
    model, adapter = small.model(), small.adapter()
    texts, negative = [small.text(1), small.text(2)], small.text(3)
    made = []
    for seed, text in enumerate(texts, 20):
        images = small.images(seed=seed)
        model, positive, _ = small.apply_conditioning(model, text, negative, adapter, images)
        made.append(positive)
    return model, texts, made, negative


def image(small, truth, seed, weight=1.0):
    """One of the images as the truth knows it."""
    positive, _ = truth.sides(small.adapter(), small.images(seed=seed), weight=weight)
    return positive


def average(one, other, share):
    from nodes import ConditioningAverage

    return ConditioningAverage().addWeighted(one, other, share)[0]


def concat(one, other, _):
    from nodes import ConditioningConcat

    return ConditioningConcat().concat(one, other)[0]


def lerp(one, other, share):
    return [[torch.lerp(other[0][0], one[0][0], share), {**one[0][1]}]]


def difference(one, other, share):
    return [[one[0][0] * share - (share - 1) * other[0][0].clone(), {**one[0][1]}]]


@pytest.mark.parametrize("node", [average, concat, lerp, difference])
@pytest.mark.parametrize("carry", [(0, 1), (0,), (1,)], ids=["both", "first", "second"])
def test_images_follow_the_arithmetic_of_their_texts(small, truth, prompted, node, carry):
    model, texts, made, negative = prompted
    share = 0.7
    weights = (1.0, 1.0) if node is concat else (share, 1 - share)
    given = [made[i] if i in carry else texts[i] for i in (0, 1)]
    images = [x for i in carry for x in image(small, truth, 20 + i, weights[i])]
    text = node(*texts, share)
    plain = small.model()
    expected = truth.apply(plain, small.LAYERS["sd15"], (text, images), (negative, []))
    truth.check(
        small.run(small.guider(model, node(*given, share), negative)),
        small.run(small.guider(expected, text, negative)),
        small.run(small.guider(plain, text, negative)),
    )


def test_an_image_that_is_applied_after_the_arithmetic_joins_the_others(small, truth, prompted):
    model, texts, made, negative = prompted
    mixed, text = average(*made, 0.25), average(*texts, 0.25)
    given = small.adapter(), small.images(seed=22)
    model, mixed, _ = small.apply_conditioning(model, mixed, negative, *given)
    images = [
        x for seed, w in ((20, 0.25), (21, 0.75), (22, 1.0)) for x in image(small, truth, seed, w)
    ]
    plain = small.model()
    expected = truth.apply(plain, small.LAYERS["sd15"], (text, images), (negative, []))
    truth.check(
        small.run(small.guider(model, mixed, negative)),
        small.run(small.guider(expected, text, negative)),
        small.run(small.guider(plain, text, negative)),
    )


def zero_out(conditioning):
    from nodes import ConditioningZeroOut

    return ConditioningZeroOut().zero_out(conditioning)[0]


def times_zero(conditioning):
    return [[conditioning[0][0] * 0, {**conditioning[0][1]}]]


@pytest.mark.parametrize("node", [zero_out, times_zero])
def test_a_zeroed_conditioning_carries_the_zero_image(small, truth, prompted, node):
    """The usual way to do without a negative text, behind the positive one."""
    model, texts, made, _ = prompted
    negative = node(texts[0])
    sides = truth.sides(small.adapter(), small.images(seed=20))
    plain = small.model()
    pairs = zip((texts[0], negative), sides, strict=True)
    expected = truth.apply(plain, small.LAYERS["sd15"], *pairs)
    truth.check(
        small.run(small.guider(model, made[0], node(made[0]))),
        small.run(small.guider(expected, texts[0], negative)),
        small.run(small.guider(plain, texts[0], negative)),
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda x: torch.nn.functional.linear(x, torch.ones(2, x.shape[-1])),
        lambda x: x * torch.rand_like(x),
        lambda x: torch.tanh(x),
    ],
    ids=["a layer reads it", "weights by token", "a function"],
)
def test_a_text_used_without_its_image_is_told_once(prompted, caplog, use):
    _, _, made, _ = prompted
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert type(use(made[0][0][0])) is torch.Tensor
    assert [record.message.count("without the") for record in caplog.records] == [1]


def test_what_only_looks_at_a_text_is_not_told(prompted, caplog):
    states = prompted[2][0][0][0]
    assert states.mean() == states.float().cpu().mean() and states.norm(dim=-1).shape == (1, 77)
    assert not caplog.records


def test_copies_keep_their_images_and_files_hold_plain_tensors(prompted):
    (states, _), *_ = prompted[2][0]
    assert copy.deepcopy(states).prompts.keys() == states.prompts.keys()
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is torch.Tensor
