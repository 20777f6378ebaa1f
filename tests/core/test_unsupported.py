"""Relatives of the IP-Adapter are refused by name; layouts as their authors publish them."""

from __future__ import annotations

import re

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.files.adapter_file import CheckpointError, load

from tests.support.checkpoint_layouts import dense, ip_adapter, linear_projection, norm, resampler
from tests.support.random_models import under


def face_projection(width, context, tokens=4):
    """Two linear layers and a normalisation over a vector."""
    layers = dense("proj.0", 2 * width, width) | dense("proj.2", tokens * context, 2 * width)
    return layers | norm("norm", context)


def with_lora(layout):
    extra = {}
    for name in ("q", "k", "v", "out"):
        extra[f"ip_adapter.0.to_{name}_lora.down.weight"] = (8, 8)
        extra[f"ip_adapter.0.to_{name}_lora.up.weight"] = (8, 8)
    return layout | extra


def consecutive(width, context):
    """K'/V' of a transformer: its blocks are numbered 0, 1, 2, … without self-attention."""
    return {
        f"ip_adapter.{n}.to_{kind}_ip.weight": (width, context) for n in range(3) for kind in "kv"
    }


WIDTHS = (8, 8)
FACE_PLUS = face_projection(512, 16) | under("perceiver_resampler.", resampler(12, 16, 64))
KOLORS = {  # one of its four layers, for speed
    key: shape
    for key, shape in resampler(24, 16, 2048).items()
    if not key.startswith("layers.") or key.startswith("layers.0.")
}
KINDS = {
    "FaceID": [
        with_lora(ip_adapter(face_projection(512, 16), WIDTHS, 16)),
        with_lora(ip_adapter(linear_projection(24, 16), WIDTHS, 16)),
        ip_adapter(face_projection(512, 16, 16), WIDTHS, 16),  # portrait: no LoRA
    ],
    "FaceID Plus": [
        with_lora(ip_adapter(FACE_PLUS, WIDTHS, 16)),
        ip_adapter(FACE_PLUS, WIDTHS, 16),
    ],
    "InstantID": [ip_adapter(resampler(512, 16, 64), WIDTHS, 16)],
    "Kolors": [ip_adapter(KOLORS, WIDTHS, 16)],
    "Flux": [
        dense("double_blocks.0.processor.ip_adapter_double_stream_k_proj", 8, 16),
        under("ip_adapter_proj_model.", linear_projection(24, 16)),
        under("image_proj.", face_projection(24, 16)) | consecutive(3072, 16),
    ],
    "SD3": [
        under("image_proj.", resampler(24, 16, 64))
        | consecutive(2432, 16)
        | dense("image_proj.time_embedding.linear_1", 8, 8)
        | dense("ip_adapter.0.norm_ip.linear", 8, 8),
        under("image_proj.", resampler(24, 16, 64)) | consecutive(1536, 16),
    ],
    "transformer's (Flux, SD3, …)": [
        under("image_proj.", linear_projection(24, 16)) | consecutive(40, 16)
    ],
}


@pytest.mark.parametrize(
    "kind, layout", [(kind, layout) for kind, layouts in KINDS.items() for layout in layouts]
)
def test_refused_by_name(kind, layout, random_weights, tmp_path):
    torch.save(random_weights(layout), tmp_path / "theirs.bin")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "theirs.bin")
    message = str(error.value)
    assert re.match(rf"'theirs.bin' is an? {re.escape(kind)} (IP-A|a)dapter", message), message
    assert "Supported are the base, fine-grained (plus) and full" in message
