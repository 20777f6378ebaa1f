"""Presets and typed weights of cross-attention layers."""

from __future__ import annotations

import pytest
from comfyui_ip_adapter.ip_adapter_core.layer_weights import (
    LAYER_PRESETS,
    LAYOUTS,
    away_weights,
    edited,
    layer_names,
    listed,
    preset_weights,
)

# In checkpoint order, written out from the published files' table.
SD15 = [
    *[("input", n, 0) for n in (1, 2, 4, 5, 7, 8)],
    *[("output", n, 0) for n in (3, 4, 5, 6, 7, 8, 9, 10, 11)],
    ("middle", 0, 0),
]
SDXL = [
    *[("input", n, i) for n in (4, 5) for i in range(2)],
    *[("input", n, i) for n in (7, 8) for i in range(10)],
    *[("output", n, i) for n in (0, 1, 2) for i in range(10)],
    *[("output", n, i) for n in (3, 4, 5) for i in range(2)],
    *[("middle", 0, i) for i in range(10)],
]
OTHER = [("output", 0, 0), ("output", 1, 0)]


def nonzero(weights, layers):
    return {layer[:2]: w for layer, w in zip(layers, weights, strict=True) if w}


def test_the_layouts_are_those_of_the_published_files():
    assert len(SD15) == 16 and len(SDXL) == 70
    assert LAYOUTS["sd15"].blocks == {layer[:2] for layer in SD15}
    assert LAYOUTS["sdxl"].blocks == {layer[:2] for layer in SDXL}


def test_style_and_composition_of_sdxl_are_instantstyles_blocks():
    """up_blocks.0.attentions.1 is N 69-87 in checkpoint order, down_blocks.2.attentions.1 is N
    29-47: layers 34-43 and 14-23 counted from 0."""
    style, composition = (preset_weights(name, SDXL) for name in ("style", "composition"))
    assert [i for i, w in enumerate(style) if w] == list(range(34, 44))
    assert [i for i, w in enumerate(composition) if w] == list(range(14, 24))
    both = preset_weights("style and composition", SDXL)
    assert both == [s + c for s, c in zip(style, composition, strict=True)]
    without = preset_weights("style without composition", SDXL)
    assert without == [s - c for s, c in zip(style, composition, strict=True)]
    strong = preset_weights("strong style", SDXL)
    assert strong == [1 - c for c in composition]


def test_style_and_composition_of_sd15():
    """Counted as the UNet runs: style 0-3 and 9-15, composition a quarter of 4 and all of 5."""
    order = [*SD15[:6], SD15[15], *SD15[6:15]]
    style = dict(zip(SD15, preset_weights("style", SD15), strict=True))
    composition = dict(zip(SD15, preset_weights("composition", SD15), strict=True))
    assert [i for i, layer in enumerate(order) if style[layer]] == [0, 1, 2, 3, *range(9, 16)]
    assert {i: composition[layer] for i, layer in enumerate(order) if composition[layer]} == {
        4: 0.25,
        5: 1.0,
    }


@pytest.mark.parametrize(
    "layers, blocks", [(SD15, 16), (SDXL, 11), (OTHER, 2)], ids=["SD1.5", "SDXL", "other"]
)
@pytest.mark.parametrize(
    "name, formula",
    [
        ("uniform", lambda i, n: 1.0),
        ("ease in", lambda i, n: 1 - 0.95 * i / (n - 1)),
        ("ease out", lambda i, n: 0.05 + 0.95 * i / (n - 1)),
        ("ease in-out", lambda i, n: 0.05 + 1.9 * min(i, n - 1 - i) / (n - 1)),
        ("reverse in-out", lambda i, n: 1 - 1.9 * min(i, n - 1 - i) / (n - 1)),
    ],
)
def test_ramps_follow_the_depth_of_the_blocks(name, formula, layers, blocks):
    sides = ("input", "middle", "output")
    order = sorted({layer[:2] for layer in layers}, key=lambda b: (sides.index(b[0]), b[1]))
    assert len(order) == blocks
    expected = [formula(order.index(layer[:2]), blocks) for layer in layers]
    assert preset_weights(name, layers) == pytest.approx(expected)


def test_one_block_alone_is_where_a_ramp_begins():
    assert preset_weights("ease in", [("output", 1, 0), ("output", 1, 1)]) == [1.0, 1.0]


@pytest.mark.parametrize(
    "name, weak",
    [
        ("weak input", {"input"}),
        ("weak middle", {"middle"}),
        ("weak output", {"output"}),
        ("strong middle", {"input", "output"}),
    ],
)
def test_sides(name, weak):
    for layers in (SD15, SDXL, OTHER):
        expected = [0.2 if layer[0] in weak else 1.0 for layer in layers]
        assert preset_weights(name, layers) == expected


@pytest.mark.parametrize("name", LAYER_PRESETS)
def test_every_preset_is_for_both_families(name):
    for layers in (SD15, SDXL):
        assert any(preset_weights(name, layers)) or any(away_weights(name, layers))


def test_what_the_negative_side_shows():
    for layers, composition, style in ((SD15, {7: 0.25, 8: 1.0}, 5), (SDXL, {8: 1.0}, 1)):
        shown = dict(zip(layers, away_weights("precise style", layers), strict=True))
        assert {key[:2]: x for key, x in shown.items() if x} == {
            ("input", number): x for number, x in composition.items()
        }
        shown = dict(zip(layers, away_weights("precise composition", layers), strict=True))
        assert shown["output", style, 0] == 1 and shown["middle", 0, 0] == 0.1
        assert not any(shown["input", number, 0] for number in composition)
        assert away_weights("away from style", layers) == [*shown.values()]
        assert not any(preset_weights("away from style", layers))
        assert not any(away_weights("style without composition", layers))


def test_a_preset_of_blocks_is_refused_for_a_model_of_others():
    with pytest.raises(ValueError, match=r"(?s)'style'.*SD1\.5 and SDXL, but.*output 0, output 1"):
        preset_weights("style", OTHER)
    with pytest.raises(ValueError, match=r"'styled'.*expected one of uniform, style"):
        preset_weights("styled", SD15)


def test_names_tell_transformers_apart_where_there_are_several():
    assert layer_names(SD15)[:2] == ["input 1", "input 2"]
    assert layer_names(SD15)[-1] == "middle"
    assert layer_names(SDXL)[13] == "input 7.9"
    assert layer_names(SDXL)[-1] == "middle.9"
    assert len(set(layer_names(SDXL))) == 70


@pytest.mark.parametrize(
    "text, changed",
    [
        ("", {}),
        ("input 7: 0.5", {("input", 7, i): 0.5 for i in range(10)}),
        ("Output 1.9 = -2e-1 # less", {("output", 1, 9): -0.2}),
        ("middle: .25", {("middle", 0, i): 0.25 for i in range(10)}),
        ("input7: 0.5", {("input", 7, i): 0.5 for i in range(10)}),
        ("output1.9＝－５，middle.0：5", {("output", 1, 9): -5, ("middle", 0, 0): 5}),
        (
            "middle.3: 0, input 4: 2; input 4.1: 3",
            {("middle", 0, 3): 0.0, ("input", 4, 0): 2.0, ("input", 4, 1): 3.0},
        ),
        (
            "# nothing\n\n output: 0\noutput 5: 1",
            {layer: float(layer[1] == 5) for layer in SDXL if layer[0] == "output"},
        ),
    ],
)
def test_typed_weights(text, changed):
    found = dict(zip(SDXL, edited([1.0] * 70, SDXL, text), strict=True))
    assert found == {layer: changed.get(layer, 1.0) for layer in SDXL}


@pytest.mark.parametrize(
    "text, message",
    [
        ("input 7", "'input 7' cannot be read"),
        ("input 7: much", "'input 7: much' cannot be read"),
        ("up 1: 0.5", "'up 1: 0.5' cannot be read"),
        ("3: 1", "'3: 1' cannot be read"),
        ("input 3: 1", "(?s)'input 3: 1' names no .*input 1, input 2, input 4"),
        ("input 1.1: 1", "'input 1.1: 1' names no"),
        ("all 3: 1", "'all 3: 1' names no"),
        ("output.1: 1", "'output.1: 1' names no"),
        ("all.1: 1", "'all.1: 1' names no"),
        ("middle: 0\nall: 1e999", "'all: 1e999' is out of range; expected -5 … 5"),
        ("input 4: -1e6", "'input 4: -1e6' is out of range"),
    ],
)
def test_typed_weights_that_mean_nothing(text, message):
    with pytest.raises(ValueError, match=message):
        edited([1.0] * 16, SD15, text)


@pytest.mark.parametrize("layers", [SD15, SDXL, OTHER], ids=len)
def test_the_list_can_be_typed_again(layers):
    weights = [round(0.08 * i - 1, 3) for i in range(len(layers))]
    assert edited([9.0] * len(layers), layers, listed(weights, layers)) == weights
    assert listed([1.0] * len(layers), layers).count("\n") + 1 == len({x[:2] for x in layers})
