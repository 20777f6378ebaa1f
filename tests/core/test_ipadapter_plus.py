"""Weight types, embeds, frames and presets of ComfyUI_IPAdapter_plus, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.files.finder import File
from comfyui_ip_adapter.ip_adapter_core.image_prompt import ImageFeatures
from comfyui_ip_adapter.ip_adapter_core.ipadapter_plus import features, frames, presets
from comfyui_ip_adapter.ip_adapter_core.ipadapter_plus.weight_types import Asked, foldings

SD15 = [("input", n, 0) for n in (1, 2, 4, 5, 7, 8)]
SD15 += [("output", n, 0) for n in range(3, 12)] + [("middle", 0, 0)]
T_SD15 = [*range(6), *range(7, 16), 6]  # of each layer, in checkpoint order
SDXL = [("input", n, i) for n, count in ((4, 2), (5, 2), (7, 10), (8, 10)) for i in range(count)]
T_SDXL = [t for t, count in enumerate((2, 2, 10, 10)) for _ in range(count)]
for _n, _count in enumerate((10, 10, 10, 2, 2, 2)):
    SDXL += [("output", _n, i) for i in range(_count)]
    T_SDXL += [5 + _n] * _count
SDXL += [("middle", 0, i) for i in range(10)]
T_SDXL += [4] * 10
STYLE = {False: {*range(4), *range(9, 16)}, True: {6}}
COMPOSITION = {False: {4: 0.25, 5: 1.0}, True: {3: 1.0}}


def by_t(folding, sdxl, side="positive"):
    numbers, weights = (T_SDXL if sdxl else T_SD15), getattr(folding, side)
    table = {}
    for t, weight in zip(numbers, weights, strict=True):
        assert table.setdefault(t, weight) == weight
    return table


def one(asked, sdxl, **more):
    ((folding, latents),) = foldings(asked, SDXL if sdxl else SD15, sdxl, **more)
    assert latents is None
    return folding


WRITTEN = {
    "linear": lambda t, n, sdxl: 1,
    "unheard of": lambda t, n, sdxl: 1,
    "ease in": lambda t, n, sdxl: 0.05 + 0.95 * (1 - t / n),
    "ease out": lambda t, n, sdxl: 0.05 + 0.95 * t / n,
    "ease in-out": lambda t, n, sdxl: 0.05 + 0.95 * (1 - abs(t - n / 2) / (n / 2)),
    "reverse in-out": lambda t, n, sdxl: 0.05 + 0.95 * abs(t - n / 2) / (n / 2),
    "weak middle": lambda t, n, sdxl: 0.2 if t == (4 if sdxl else 6) else 1,
    "weak input": lambda t, n, sdxl: 0.2 if t < (4 if sdxl else 6) else 1,
    "weak output": lambda t, n, sdxl: 0.2 if t > (4 if sdxl else 6) else 1,
    "strong middle": lambda t, n, sdxl: 1 if t == (4 if sdxl else 6) else 0.2,
    "style transfer": lambda t, n, sdxl: float(t in STYLE[sdxl]),
    "composition": lambda t, n, sdxl: COMPOSITION[sdxl].get(t, 0),
    "strong style transfer": lambda t, n, sdxl: float(t not in COMPOSITION[sdxl]),
}


@pytest.mark.parametrize("sdxl", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_weight_type(name, sdxl):
    folding = one(Asked(name, 0.8), sdxl)
    n = 11 if sdxl else 16
    wanted = {t: 0.8 * WRITTEN[name](t, n, sdxl) for t in range(n)}
    assert by_t(folding, sdxl) == pytest.approx(wanted)
    assert folding.negative == folding.positive and not any(folding.itself)


@pytest.mark.parametrize("sdxl", [False, True])
def test_the_composition_has_a_weight_of_its_own(sdxl):
    found = by_t(one(Asked("style and composition", 0.8), sdxl), sdxl)
    wanted = {t: 0.8 if t in STYLE[sdxl] else COMPOSITION[sdxl].get(t, 0.0) for t in found}
    assert found == pytest.approx(wanted)
    strong = Asked("strong style and composition", 0.8, composition=1.7)
    found = by_t(one(strong, sdxl), sdxl)
    assert found == pytest.approx({t: 1.7 if t in COMPOSITION[sdxl] else 0.8 for t in found})


@pytest.mark.parametrize("boost", [None, 1.6])
@pytest.mark.parametrize("sdxl", [False, True])
def test_the_precise_types_turn_the_negative_side(sdxl, boost):
    style = one(Asked("style transfer precise", 0.8, boost=boost), sdxl)
    b = 0.8 if boost is None else boost
    negative = {t: 0.8 if t in STYLE[sdxl] else 0.0 for t in range(11 if sdxl else 16)}
    negative |= {t: b * x for t, x in COMPOSITION[sdxl].items()}
    assert by_t(style, sdxl, "negative") == pytest.approx(negative)
    shown = {t for t, itself in by_t(style, sdxl, "itself").items() if itself}
    assert shown == {*COMPOSITION[sdxl]}
    assert all(by_t(style, sdxl)[t] == 0 for t in shown)

    whole = one(Asked("composition precise", 0.8, boost=boost), sdxl)
    rest = {t: b if t in STYLE[sdxl] else 0.1 * b for t in range(11 if sdxl else 16)}
    negative = rest | {t: 0.8 * x for t, x in COMPOSITION[sdxl].items()}
    assert by_t(whole, sdxl, "negative") == pytest.approx(negative)
    shown = {t for t, itself in by_t(whole, sdxl, "itself").items() if itself}
    assert shown == negative.keys() - COMPOSITION[sdxl].keys()


def test_the_middle_block_did_not_act():
    found = by_t(one(Asked(), False, middle=False), False)
    assert found == {**dict.fromkeys(range(16), 1.0), 6: 0.0}


def test_a_list_of_weights_leaves_constants_alone():
    parts = foldings(Asked("style and composition", [0.2, 0.9]), SD15, False)
    (style, latents), (composition, none) = parts
    assert latents == [0.2, 0.9] and none is None
    assert by_t(style, False)[4] == 0 and by_t(style, False)[0] == 1
    assert by_t(composition, False)[5] == 1 and by_t(composition, False)[0] == 0
    assert len(foldings(Asked("ease in", [0.2, 0.9]), SD15, False)) == 1


def test_blocks_by_number():
    found = by_t(one(Asked("ease in", 0.5, layers="3:0.8, 6:0.35,\n0: 2"), True), True)
    assert found == pytest.approx({**dict.fromkeys(range(11), 0.0), 3: 0.4, 6: 0.175, 0: 1.0})
    precise = one(Asked("composition precise", 1.0, layers="3:0.8, 6:0.35"), True)
    assert {t for t, own in by_t(precise, True, "itself").items() if own} == {*range(11)} - {3}
    with pytest.raises(ValueError, match="layer_weights has 'a:1'; expected the number of a block"):
        one(Asked(layers="3:1, a:1"), True)


METHODS = {
    "concat": lambda x: x,
    "add": lambda x: x[0] + x[1] + x[2],
    "subtract": lambda x: x[0] - (x[1] + x[2]) / 2,
    "average": lambda x: (x[0] + x[1] + x[2]) / 3,
    "max": lambda x: torch.stack(list(x)).max(0).values,
    "min": lambda x: torch.stack(list(x)).min(0).values,
    "norm average": lambda x: sum(y / (x[0] ** 2 + x[1] ** 2 + x[2] ** 2).sqrt() for y in x) / 3,
}


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6)])
@pytest.mark.parametrize("method", METHODS)
def test_images_to_one(method, shape):
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted = METHODS[method](given).reshape(-1, *shape[1:])
    torch.testing.assert_close(features.across_images(given, method), wanted)
    alone = features.across_images(given[:1], method)
    assert torch.equal(alone, given[:1]), "one image stays as it is, never NaN"


def test_a_component_that_is_0_in_all_images():
    given = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    found = features.across_images(given, "norm average")
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.7]]))


def test_rows_repeat_the_last_and_are_cut():
    rows = torch.arange(3)
    assert features.to_rows(rows, 5).tolist() == [0, 1, 2, 2, 2]
    assert features.to_rows(rows, 2).tolist() == [0, 1]


def test_pieces_and_what_they_average_to():
    image = torch.arange(2 * 6 * 4, dtype=torch.float32).reshape(2, 6, 4, 1)
    cut = features.pieces(image, 2)
    assert cut.shape == (8, 3, 2, 1)
    assert torch.equal(cut[1], image[0, :3, 2:]) and torch.equal(cut[6], image[1, 3:, :2])
    states = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2))
    whole = ImageFeatures(torch.zeros(1, 0), torch.ones(1, 5, 3))
    made = features.enhanced(whole, ImageFeatures(torch.zeros(4, 0), states), 2, 0.5)
    found = made.penultimate_hidden_states
    assert found.shape == (2, 5, 3) and torch.equal(found[0], torch.full((5, 3), 0.5))
    torch.testing.assert_close(found[1, 0], states[:, 0].mean(0))
    torch.testing.assert_close(found[1, 1:], states[:, 1:].mean(1))  # each piece has 2 × 2 patches
    with pytest.raises(ValueError, match="12 wide, which is no square"):
        features.enhanced(
            ImageFeatures(torch.zeros(1, 12), torch.zeros(1, 0, 0)),
            ImageFeatures(torch.zeros(4, 12), torch.zeros(4, 0, 0)),
            2,
            1.0,
        )


CURVES = {
    "linear": lambda x: x,
    "ease_in_out": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "ease_in": lambda x: math.sin(math.pi * x / 2),
    "ease_out": lambda x: 1 - math.cos(math.pi * x / 2),
}


@pytest.mark.parametrize("timing", CURVES)
def test_weights_over_frames(timing):
    strategy = frames.Strategy("0.2\n0.9", timing, frames=8, start_frame=2, end_frame=6)
    made, one, other = frames.weights_over(strategy, None)
    between = [0.2 + 0.7 * CURVES[timing](i / 3) for i in range(4)]
    assert made == pytest.approx([0.2, 0.2, *between, 0.9, 0.9]) and one is other is None


def test_one_frame_in_between_is_the_end():
    made, *_ = frames.weights_over(frames.Strategy("0, 1", "linear", 4, 2, 3), None)
    assert made == [0, 0, 1, 1]


def test_weights_that_are_no_numbers():
    with pytest.raises(ValueError, match="weights has 'fast'; expected numbers"):
        frames.weights_over(frames.Strategy("1, fast"), None)


@pytest.mark.parametrize("method, weights, ones, others", [
    ("full batch", [0, 1] * 4, [0, 0, 1, 1, 2, 2, 3, 3], None),
    ("shift batches", [0, 1] * 3, [0, 0, 1, 1, 2, 2], [1, 1, 2, 2, 3, 3]),
    ("alternate batches", [0, 1, 1, 0, 0, 1], [0, 0, 2, 2, 2, 2], [1, 1, 1, 1, 3, 3]),
])  # fmt: skip
def test_pictures_that_weights_fade_between(method, weights, ones, others):
    image = torch.arange(4.0).reshape(4, 1, 1, 1)
    strategy = frames.Strategy("0, 1", "custom", method=method)
    made, one, other = frames.weights_over(strategy, image)
    assert made == weights and one.flatten().tolist() == ones
    assert (None if other is None else other.flatten().tolist()) == others


def names(*given):
    return [File(name, f"/models/{name}") for name in given]


@pytest.mark.parametrize("preset, sdxl, among, wanted", [
    ("STANDARD (medium strength)", False,
     ["ip-adapter_sd15_light.safetensors", "ip-adapter_sd15.safetensors"], 1),
    ("STANDARD (medium strength)", True,
     ["ip-adapter_sdxl.bin", "sub/IP-Adapter_SDXL_vit-h.bin"], 1),
    ("VIT-G (medium strength)", True, ["ip-adapter_sdxl_vit-h.bin", "ip-adapter_sdxl.bin"], 1),
    ("LIGHT - SD1.5 only (low strength)", False,
     ["ip-adapter_sd15_light.bin", "ip-adapter_sd15_light_v11.bin"], 1),
    ("PLUS (high strength)", False,
     ["ip-adapter-plus-face_sd15.bin", "ip-adapter-plus_sd15.bin"], 1),
    ("PLUS FACE (portraits)", True, ["ip-adapter-plus-face_sdxl_vit-h.safetensors"], 0),
    ("Composition", False, ["ip_plus_composition_sd15.bin", "ip_plus_composition_sd15.safetensors"],
     1),
    ("plus (high strength)", False, ["ip-adapter-plus_sd15.pt"], None),
])  # fmt: skip
def test_names_that_presets_take(preset, sdxl, among, wanted):
    files = names(*among)
    found = presets.preset_of(preset).adapter(files, sdxl)
    assert found == (None if wanted is None else files[wanted])


def test_presets_by_how_they_begin():
    assert presets.preset_of("Plus Face").native == "face"
    assert presets.preset_of("PLUS").native == "fine-grained"
    assert presets.preset_of("vit-g (whatever)").native == "bigG"
    with pytest.raises(ValueError, match="preset is 'REGULAR - FLUX'; expected one of LIGHT"):
        presets.preset_of("REGULAR - FLUX")
