"""One fingerprint for the same encoder, another for others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.files.fingerprint import fingerprint
from torch import nn

ROOT = Path(__file__).parents[3]
ANEW = """
import sys
sys.path.append(sys.argv[1])
import torch
from ip_adapter_core.files.fingerprint import fingerprint
torch.manual_seed(3)
print(fingerprint(torch.nn.Linear(40, 30)))
"""


def encoder(seed=0, width=64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, width), nn.LayerNorm(width), nn.Linear(width, 24))
    for weight in model.parameters():  # some that rounding makes 0
        weight.data.view(-1)[::7] *= 1e-9
    return model


@pytest.mark.parametrize(
    "dtype",
    [*(torch.float16, torch.bfloat16, torch.float64), *(torch.float8_e4m3fn, torch.float8_e5m2)],
)
def test_the_dtype_does_not_count(dtype):
    expected = fingerprint(encoder())
    assert len(expected) == 64
    assert fingerprint(encoder().to(dtype)) == expected
    assert fingerprint(encoder().half().to(dtype)) == expected


def test_nor_how_weights_lie_in_memory():
    model = encoder()
    expected = fingerprint(model)
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    assert fingerprint(model) == expected


def test_it_is_the_same_in_another_process():
    command = [sys.executable, "-c", ANEW, str(ROOT)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.home())
    torch.manual_seed(3)
    assert found.stdout.strip() == fingerprint(nn.Linear(40, 30))


def test_settings_count_in_any_order():
    settings = {"activation": "gelu", "image_size": 224, "mean": [0.4, 0.5, 0.6]}
    others = [
        *({}, settings, settings | {"activation": "quick_gelu"}),
        *(settings | {"image_size": 336}, settings | {"mean": [0.5, 0.5, 0.5]}),
    ]
    assert len({fingerprint(encoder(), **given) for given in others}) == len(others)
    turned = dict(reversed(settings.items()))
    assert fingerprint(encoder(), **turned) == fingerprint(encoder(), **settings)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_layer_counts(layer):
    expected, model = fingerprint(encoder()), encoder()
    bias = model[layer].bias
    bias.data += 0.3 * torch.randn(bias.shape)
    assert fingerprint(model) != expected


def test_a_little_training_counts():
    """One step that moves every weight by a hundredth of its scale."""
    expected, model = fingerprint(encoder()), encoder()
    for weight in model.parameters():
        weight.data += 0.01 * weight.std() * torch.randn(weight.shape)
    assert fingerprint(model) != expected


def test_other_weights_names_and_shapes_count():
    prints = {fingerprint(encoder(seed)) for seed in range(5)}
    prints |= {fingerprint(encoder(width=65)), fingerprint(nn.Sequential(encoder()))}
    torch.manual_seed(0)
    wide, tall = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
    tall.weight.data = wide.weight.data.reshape(8, 4)
    prints |= {fingerprint(wide), fingerprint(tall)}
    assert len(prints) == 9
