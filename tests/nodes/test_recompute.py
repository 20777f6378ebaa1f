"""Changing λ, window or mask encodes no image, reads no file, and touches nothing made before."""

from __future__ import annotations

import collections

import pytest
import torch

CHANGES = [
    {"weight": 0.3},
    {"weight": -1.0},
    {"start_at": 0.4},
    {"end_at": 0.3},
    {"mask": torch.rand(1, 12, 12)},
    {"layer_weights": [0.5] * 16},
    {"combine": "average"},
]


@pytest.fixture
def counts(clip_vision, monkeypatch):
    """How often files are read and pictures encoded."""
    from comfyui_ip_adapter.ip_adapter_core.files import adapter_file as checkpoint

    counts: collections.Counter[str] = collections.Counter()

    def counted(owner, name):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(checkpoint, "load")
    counted(checkpoint, "load_file")
    counted(clip_vision, "encode_image")
    counted(clip_vision.model, "forward")
    return counts


@pytest.fixture
def made(nodes, folder, saved, clip_vision, counts):
    """What the loader and the encoder give, from a file and from pictures."""
    saved(folder / "a.safetensors")
    pictures = torch.rand(2, 40, 24, 3, generator=torch.Generator().manual_seed(1))
    adapter = nodes["IPA_LoadAdapter"].execute("a.safetensors").args[0]
    prompt = nodes["IPA_EncodeImage"].execute(clip_vision, pictures, "center").args[0]
    assert counts["load"] == counts["load_file"] == counts["encode_image"] == 1
    return adapter, prompt


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: f"{next(iter(c))}")
def test_only_keys_and_values_are_computed_again(small, made, counts, change):
    model, texts = small.model(), (small.text(1), small.text(2))
    before = dict(counts)

    def run(model):
        return small.run(small.guider(model, *texts), at=(0.2, 0.5))

    first = small.apply(model, *made)
    result = run(first)
    changed = run(small.apply(model, *made, **change))
    assert not torch.allclose(changed, result, atol=1e-3)
    assert torch.equal(run(first), result)
    assert torch.equal(run(small.apply(model, *made)), result)
    assert dict(counts) == before


def test_one_prompt_for_two_adapters(small, nodes, folder, saved, made, counts):
    saved(folder / "b.safetensors", seed=12, tokens=2)
    other = nodes["IPA_LoadAdapter"].execute("b.safetensors").args[0]
    encoded = counts["encode_image"], counts["forward"]
    model = small.apply(small.apply(small.model(), *made), other, made[1])
    assert small.run(small.guider(model, small.text(1), small.text(2))).isfinite().all()
    assert (counts["encode_image"], counts["forward"]) == encoded
