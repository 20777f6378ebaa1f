"""Published adapters for Flux.1 are known by their tensors, in both spellings of their names."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from ip_adapter_core.files.adapter_file import CheckpointError, load, recognize
from ip_adapter_core.files.header import Shape
from ip_adapter_core.files.trained_layouts import published
from tests.support.checkpoint_layouts import (
    as_diffusers,
    dense,
    instantx,
    norm,
    resampler,
    xlabs,
)
from tests.support.random_models import under, weights

WIDTH, TEXT, DOUBLE, SINGLE = 3072, 4096, 19, 38


def header(layout):
    return {key: Shape(shape, torch.bfloat16) for key, shape in layout.items()}


def recognized(layout, name="ip-adapter-plus-face_sd15.bin"):
    return recognize(published(header(layout), name), name)


FILES = {  # megabytes on the hub, tensors, variant, tokens, embedding, place
    "XLabs v1": (982, xlabs(4), "base", 4, 768, "block output"),
    "XLabs v2": (1057, xlabs(16), "base", 16, 768, "block output"),
    "XLabs v2 as diffusers": (1057, as_diffusers(xlabs(16)), "base", 16, 768, "block output"),
    "InstantX": (5290, instantx(), "instantx", 128, 1152, "attention output"),
}


@pytest.mark.parametrize("name", FILES)
def test_published_files(name):
    megabytes, layout, variant, tokens, embed, place = FILES[name]
    assert sum(2 * math.prod(x) for x in layout.values()) / 1e6 == pytest.approx(megabytes, 2e-3)
    spec = recognized(layout)
    assert (spec.variant, spec.tokens, spec.place) == (variant, tokens, place)
    assert (spec.features, spec.feature_dim) == ("image_embeds", embed)
    layers = DOUBLE if place == "block output" else DOUBLE + SINGLE
    assert spec.layer_dims == (WIDTH,) * layers and spec.cross_attention_dim == TEXT
    assert not spec.kolors


@pytest.mark.parametrize("spelling", [dict, as_diffusers])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_both_spellings_are_read(tmp_path, spelling, ending):
    small = spelling(xlabs(4, width=32, text=24, embed=28, blocks=3))
    state, path = weights(small, 1), tmp_path / f"a.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    found = load(path).state_dict()
    expected = {as_diffusers({key: 0}).popitem()[0]: x for key, x in state.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def without(layout, part):
    return {key: x for key, x in layout.items() if part not in key}


def of_blocks(*tensors):
    """Each of these on every block."""
    return {f"ip_adapter.{n}.{key}": x for n in range(57) for key, x in tensors}


CHARACTER = of_blocks(("to_k_ip.bias", (WIDTH,)), ("norm_ip_q.weight", (128,)))
NEARLY = {
    "a block is missing": (
        without(xlabs(4), "double_blocks.7."),
        r"numbers its layers 0, 1, 2.*Flux\.1\) without gaps, but 7 is missing",
    ),
    "a bias is missing": (
        without(xlabs(4), "double_blocks.7.processor.ip_adapter_double_stream_k_proj.bias"),
        r"incomplete: 1 of .*ip_adapter\.7\.to_k_ip\.bias",
    ),
    "no projection": (without(xlabs(4), "ip_adapter_proj_model"), "no 'image_proj"),
    "blocks of two widths": (
        {**instantx(), "ip_adapter.5.to_v_ip.weight": (WIDTH, 24)},
        r"'ip_adapter\.5\.to_v_ip\.weight' has shape \[3072, 24\]",
    ),
    "a UNet's numbers with XLabs' biases": (
        {f"ip_adapter.{2 * n + 1}.to_{k}_ip.{p}": (320, 768)[: 2 if p == "weight" else 1]
         for n in range(16) for k in "kv" for p in ("weight", "bias")}
        | under("image_proj.", dense("proj", 4 * 768, 1024) | norm("norm", 768)),
        "tensors that no supported IP-Adapter has.*another kind of model",
    ),
    "InstantCharacter": (
        without(instantx(), "image_proj.")
        | under("image_proj.", resampler(1152, TEXT, 1280)) | CHARACTER,
        "an InstantCharacter adapter for Flux",
    ),
    "another projection": (
        without(instantx(), "image_proj.") | under("image_proj.", resampler(1152, TEXT, 1280)),
        "numbers its layers as adapters of transformers.*plus adapter; expected that of XLabs",
    ),
    "SD3.5's": (
        without(instantx(blocks=38, width=2432), "image_proj.")
        | under("image_proj.", resampler(1152, 2432, 1280))
        | {"ip_adapter.0.norm_ip.linear.weight": (4864, 1280)},
        "an SD3 IP-Adapter, which is no IP-Adapter of this pack's.*XLabs' and InstantX's for Flux",
    ),
    "a Flux LoRA": (
        {f"transformer.single_transformer_blocks.{n}.attn.to_q.lora_A.weight": (16, WIDTH)
         for n in range(38)},
        "no IP-Adapter",
    ),
    "a Flux ControlNet": (dense("controlnet_x_embedder", WIDTH, 64), "no IP-Adapter"),
    "Redux": (dense("redux_up", 12288, 1152) | dense("redux_down", 4096, 12288), "no IP-Adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEARLY)
def test_what_is_nearly_one(case):
    layout, said = NEARLY[case]
    with pytest.raises(CheckpointError, match=rf"(?s)'flux-ip-adapter'.*{said}"):
        recognized(layout, "flux-ip-adapter")
