"""Writing checkpoints: the official layout, in fp16, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter
from comfyui_ip_adapter.ip_adapter_core.files import adapter_file as checkpoint
from safetensors import safe_open

SIZES = {
    "base": {"feature_dim": 24, "cross_attention_dim": 16, "tokens": 4},
    "full": {"feature_dim": 24, "cross_attention_dim": 16},
    "plus": {
        "feature_dim": 24,
        "cross_attention_dim": 16,
        "tokens": 16,
        "dim": 64,
        "depth": 4,
        "heads": 1,
    },
}


def make(kind, seed=0):
    torch.manual_seed(seed)
    return IPAdapter(AdapterSpec(kind, tuple(SIZES[kind].items()), (8, 16, 8)))


@pytest.mark.parametrize("kind", SIZES)
def test_round_trip(kind, tmp_path):
    adapter = make(kind)
    path = tmp_path / "trained.safetensors"
    checkpoint.save(adapter, path, {"step": "1000", "encoder": "ViT-H/14"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "1000", "encoder": "ViT-H/14"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    loaded = checkpoint.load(path)
    assert loaded.spec.layer_dims == adapter.spec.layer_dims
    assert loaded.spec.sizes.items() >= adapter.spec.sizes.items()
    for key, value in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_weights_in_any_memory_layout_are_written(tmp_path):
    adapter = make("base")
    adapter.ip_adapter["3"].to_k_ip.weight = torch.nn.Parameter(torch.randn(16, 16).T)
    adapter.half()
    checkpoint.save(adapter, tmp_path / "a.safetensors", {})
    found = checkpoint.load(tmp_path / "a.safetensors").state_dict()["ip_adapter.3.to_k_ip.weight"]
    assert torch.equal(found, adapter.ip_adapter["3"].to_k_ip.weight)


def test_saving_leaves_the_adapter_as_it_is(tmp_path):
    adapter = make("full")
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    checkpoint.save(adapter, tmp_path / "a.safetensors", {})
    for key, value in adapter.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])
    assert all(p.requires_grad for p in adapter.parameters())


def test_a_crash_while_writing_keeps_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.save(make("base", seed=1), path, {})
    older = path.read_bytes()

    write = Path.write_bytes

    def half_written(target, content):
        write(target, content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(make("base", seed=2), path, {})
    assert path.read_bytes() == older
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(make("base", seed=2), tmp_path / "new.safetensors", {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_others_may_read_it_as_any_new_file(tmp_path):
    checkpoint.save(make("base", seed=1), tmp_path / "a.safetensors", {})
    (tmp_path / "any").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
