"""Adapters' files: every published one is recognized in every format, written and read back."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.adapter import IPAdapter
from comfyui_ip_adapter.ip_adapter_core.files import adapter_file as checkpoint
from comfyui_ip_adapter.ip_adapter_core.files.adapter_file import infer_spec, load, unsupported_kind
from safetensors import safe_open
from safetensors.torch import save, save_file

from tests.support.checkpoint_layouts import (
    full_projection,
    ip_adapter,
    linear_projection,
    resampler,
)
from tests.support.random_models import sections
from tests.support.random_models import weights as random_weights

SD15 = (320, 320, 640, 640, 1280, 1280, *[1280] * 3, *[640] * 3, *[320] * 3, 1280)
SDXL = (*[640] * 4, *[1280] * 20, *[1280] * 30, *[640] * 6, *[1280] * 10)
EMBEDS, STATES = "image_embeds", "penultimate_hidden_states"

# layout, widths, text width, class, features read, their width, tokens, millions in projection
PUBLISHED = {
    "sd15": (linear_projection(1024, 768), SD15, 768, "base", EMBEDS, 1024, 4, 3.15),
    "sd15_vit-G": (linear_projection(1280, 768), SD15, 768, "base", EMBEDS, 1280, 4, 3.94),
    "sd15_plus": (resampler(1280, 768, 768), SD15, 768, "plus", STATES, 1280, 16, 29.92),
    "sd15_full": (full_projection(1280, 768), SD15, 768, "full", STATES, 1280, None, 2.63),
    "sdxl": (linear_projection(1280, 2048), SDXL, 2048, "base", EMBEDS, 1280, 4, 10.50),
    "sdxl_vit-h": (linear_projection(1024, 2048), SDXL, 2048, "base", EMBEDS, 1024, 4, 8.40),
    "sdxl_plus": (resampler(1280, 2048, 1280), SDXL, 2048, "plus", STATES, 1280, 16, 82.96),
}
SMALL = {
    "base": ip_adapter(linear_projection(24, 16), (8, 16, 8), 16),
    "plus": ip_adapter(resampler(24, 16, 64), (8, 16, 8), 16),
    "full": ip_adapter(full_projection(24, 16), (8, 16, 8), 16),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


WRITERS = {
    "dotted.safetensors": save_file,
    "nested.bin": lambda weights, path: torch.save(sections(weights), path),
    "nested.pt": lambda weights, path: torch.save(sections(weights), path),
    "dotted.bin": torch.save,
    "before-torch-1.6.bin": lambda weights, path: torch.save(
        sections(weights), path, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_recognised(name):
    projection, widths, context, kind, features, feature_dim, tokens, millions = PUBLISHED[name]
    layout = ip_adapter(projection, widths, context)
    weights = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
    assert unsupported_kind(weights) is None
    spec = infer_spec(weights, "file")
    assert (spec.variant, spec.features, spec.feature_dim) == (kind, features, feature_dim)
    assert (spec.tokens, spec.cross_attention_dim, spec.layer_dims) == (tokens, context, widths)
    module = IPAdapter(spec, device="meta")
    assert {key: tuple(w.shape) for key, w in module.state_dict().items()} == layout
    count = sum(p.numel() for p in module.image_proj.parameters())
    assert round(count / 1e6, 2) == millions
    count = sum(p.numel() for p in module.ip_adapter.parameters())
    assert count == {768: 19_169_280, 2048: 340_787_200}[context]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("kind", SMALL)
def test_every_format_and_precision(kind, file, dtype, tmp_path):
    weights = {key: value.to(dtype) for key, value in random_weights(SMALL[kind]).items()}
    WRITERS[file](weights, tmp_path / file)
    adapter = load(tmp_path / file)
    assert adapter.spec.variant == kind
    found = adapter.state_dict()
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("name", ["ip-adapter-plus_sdxl_vit-h.bin", "faceid.pt", "no extension"])
def test_a_files_name_means_nothing(name, tmp_path):
    torch.save(random_weights(SMALL["base"]), tmp_path / name)
    assert load(tmp_path / name).spec.variant == "base"
    save_file(random_weights(SMALL["full"]), tmp_path / name)
    assert load(tmp_path / name).spec.variant == "full"


@pytest.mark.parametrize("length", [0x3C20, 0x13C20])  # the file begins with " <"
def test_a_safetensors_file_that_begins_like_a_web_page(length, tmp_path):
    weights = random_weights(SMALL["base"])
    data = save(weights)
    (header,) = struct.unpack("<Q", data[:8])
    padded = data[8 : 8 + header].ljust(length)
    (tmp_path / "a.safetensors").write_bytes(
        struct.pack("<Q", length) + padded + data[8 + header :]
    )
    found = load(tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("tokens, depth, heads", [(16, 4, 1), (8, 2, 3), (1, 1, 2)])
def test_resamplers_of_other_sizes(tokens, depth, heads):
    layout = resampler(24, 16, 64 * heads, tokens)
    for key in list(layout):
        if key.startswith("layers.") and int(key.split(".")[1]) >= depth:
            del layout[key]
    weights = random_weights(ip_adapter(layout, (8, 16), 16))
    spec = infer_spec(weights, "file")
    assert (spec.tokens, spec.sizes["depth"], spec.sizes["heads"]) == (tokens, depth, heads)
    IPAdapter(spec).load_state_dict(weights)


def make(kind, seed=0):
    spec = infer_spec(random_weights(SMALL[kind]), "made")
    torch.manual_seed(seed)
    return IPAdapter(spec)


@pytest.mark.parametrize("kind", SMALL)
def test_round_trip(kind, tmp_path):
    """The file is in half precision; the adapter stays as it is."""
    adapter = make(kind)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    path = tmp_path / "trained.safetensors"
    checkpoint.save(adapter, path, {"step": "1000", "encoder": "ViT-H/14"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "1000", "encoder": "ViT-H/14"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    loaded = checkpoint.load(path)
    assert loaded.spec == adapter.spec
    for key, value in adapter.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[key])
        assert torch.equal(loaded.state_dict()[key], value.half())
    assert all(p.requires_grad for p in adapter.parameters())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_weights_in_any_memory_layout_are_written(tmp_path):
    adapter = make("base")
    adapter.ip_adapter["3"].to_k_ip.weight = torch.nn.Parameter(torch.randn(16, 16).T)
    adapter.half()
    checkpoint.save(adapter, tmp_path / "a.safetensors", {})
    found = checkpoint.load(tmp_path / "a.safetensors").state_dict()["ip_adapter.3.to_k_ip.weight"]
    assert torch.equal(found, adapter.ip_adapter["3"].to_k_ip.weight)


def test_a_crash_while_writing_keeps_the_older_file(tmp_path, monkeypatch):
    path, write = tmp_path / "a.safetensors", Path.write_bytes
    checkpoint.save(make("base", seed=1), path, {})
    older = path.read_bytes()

    def half_written(target, content):
        write(target, content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(make("base", seed=2), target, {})
    assert path.read_bytes() == older
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
