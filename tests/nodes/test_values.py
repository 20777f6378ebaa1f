"""Values out of their domain: the message names the input, what was found, what was expected."""

from __future__ import annotations

import pytest
import torch

NAN, INF = float("nan"), float("inf")


def broken_mask(value):
    mask = torch.ones(1, 8, 8)
    mask[0, 3, 3] = value
    return mask


BAD = {
    "no mask": ({"mask": torch.ones(0, 8, 8)}, ["mask", "[0, 8, 8]", "[masks, height, width]"]),
    "mask without pixels": ({"mask": torch.ones(1, 0, 8)}, ["mask", "[1, 0, 8]"]),
    "a picture for a mask": ({"mask": torch.ones(1, 8, 8, 3)}, ["mask", "[1, 8, 8, 3]"]),
    "mask of one dimension": ({"mask": torch.ones(8)}, ["mask", "[8]", "height, width"]),
    "NaN in the mask": ({"mask": broken_mask(NAN)}, ["mask", "NaN", "0 … 1"]),
    "infinite mask": ({"mask": broken_mask(INF)}, ["mask", "infinite"]),
    "start after end": (
        {"start_at": 0.6, "end_at": 0.4},
        ["start_at", "0.6", "after", "end_at", "0.4"],
    ),
    "start NaN": ({"start_at": NAN}, ["start_at", "nan", "finite"]),
    "end NaN": ({"end_at": NAN}, ["end_at", "nan", "finite"]),
    "weight NaN": ({"weight": NAN}, ["weight", "nan", "finite"]),
    "weight infinite": ({"weight": -INF}, ["weight", "-inf", "finite"]),
    "15 layers": ({"layer_weights": [1.0] * 15}, ["layer_weights", "15", "16", "down, up, middle"]),
    "no layers": ({"layer_weights": []}, ["layer_weights", "0 values", "16"]),
    "a layer NaN": ({"layer_weights": [1.0] * 15 + [NAN]}, ["layer_weights", "nan", "finite"]),
    "unknown combine": ({"combine": "mix"}, ["combine", "mix", "concat, average, per_latent"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("route", ["model", "conditioning"])
def test_refused_with_the_reason(small, route, case):
    settings, words = BAD[case]
    given = small.adapter(), small.images()
    with pytest.raises(ValueError) as error:
        if route == "model":
            small.apply(small.model(), *given, **settings)
        else:
            texts = small.text(1), small.text(2)
            small.apply_conditioning(small.model(), *texts, *given, **settings)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value!s} does not say {missing}"


GOOD = {
    "negative weight": {"weight": -0.7},
    "large weight": {"weight": 5.0},
    "a window of one point": {"start_at": 0.5, "end_at": 0.5},
    "mask without a batch": {"mask": torch.ones(8, 8)},
    "mask of one pixel": {"mask": torch.full((1, 1, 1), 0.5)},
    "mask of one line": {"mask": torch.ones(1, 1, 4000)},
    "masks in float64": {"mask": torch.ones(2, 300, 7, dtype=torch.float64)},
    "mask above 1": {"mask": torch.full((1, 8, 8), 1.5)},
    "weights that are integers": {"layer_weights": (0, 1) * 8},
}


@pytest.mark.parametrize("case", GOOD)
def test_works(small, case):
    model, texts = small.model(), (small.text(1), small.text(2))
    patched = small.apply(model, small.adapter(), small.images(), **GOOD[case])
    found, bare = (small.run(small.guider(m, *texts), at=(0.5,)) for m in (patched, model))
    assert found.isfinite().all()
    assert not torch.allclose(found, bare, atol=1e-2)


def test_per_latent_negatives_of_another_number(small, nodes, clip_vision):
    pictures = torch.rand(5, 32, 32, 3)
    encode = nodes["IPA_EncodeImage"].execute
    prompt = encode(clip_vision, pictures[:3], "center", pictures[3:]).args[0]
    with pytest.raises(ValueError, match="3 images and 2 negative"):
        small.apply(small.model(), small.adapter(), prompt, combine="per_latent")
