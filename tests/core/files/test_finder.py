"""Files are recognized by their headers alone, and nothing that lies in a folder stops a search."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.files import adapter_file, encoder_file, finder
from comfyui_ip_adapter.ip_adapter_core.files.header import CheckpointError, read_header
from comfyui_ip_adapter.ip_adapter_core.files.tower_config import ImageEncoderError
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support import sparse_files as sparse
from tests.support.random_models import sections

# Embedding, hidden states, layers, positions, MLP: the sizes in the models' cards.
CARDS = {
    "ViT-L": (768, 1024, 24, 257, 4096),
    "ViT-L-336": (768, 1024, 24, 577, 4096),
    "ViT-H": (1024, 1280, 32, 257, 5120),
    "ViT-bigG": (1280, 1664, 48, 257, 8192),
    "ViT-g": (1024, 1408, 40, 257, 6144),
}


def file(path):
    return finder.File(path.name, str(path))


def encoder(path):
    return finder.encoders([file(path)])[0]


def adapter(path):
    return finder.adapters([file(path)])[0]


def header_bytes(path):
    with open(path, "rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def sizes(found):
    s = found.sizes
    return s.embed_dim, s.hidden_dim, s.layers, s.positions, s.mlp_dim


def read_by_this_process():
    """Bytes read from files, and pages of mapped ones that were touched."""
    import resource  # of Unix

    with open("/proc/self/io") as io:
        count = int(io.readline().split()[1])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return count + 4096 * (usage.ru_minflt + usage.ru_majflt)


def test_the_header_says_what_safetensors_says(tmp_path):
    weights = {"a": torch.rand(2, 3), "b": torch.rand(4).half(), "c": torch.ones((), dtype=int)}
    save_file(weights, tmp_path / "f.safetensors", {"told": "yes", "and": "ü"})
    found, metadata = read_header(tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", "pt") as theirs:
        assert metadata == theirs.metadata()
    assert {k: x.shape for k, x in found.items()} == {k: tuple(x.shape) for k, x in weights.items()}
    assert (found["a"].dtype, found["b"].dtype) == (torch.float32, torch.float16)
    assert found["c"].ndim == 0


@pytest.mark.parametrize("name", sparse.ADAPTERS)
def test_adapters_of_real_sizes(name, tmp_path):
    found = adapter(sparse.write(tmp_path / "any.safetensors", sparse.ADAPTERS[name]))
    weights = {k: torch.empty(s, device="meta") for k, s in sparse.ADAPTERS[name].items()}
    assert found.spec == adapter_file.infer_spec(weights, "the same, of tensors")
    assert found.trained_with is None


@pytest.mark.parametrize("name", sparse.SIZES)
def test_encoders_of_transformers(name, tmp_path):
    path = tmp_path / "any.safetensors"
    found = encoder(sparse.write(path, sparse.vision(name)))
    assert sizes(found) == CARDS[name]
    assert (found.sizes.layout, found.sizes.alone) == ("transformers", True)


def test_encoders_with_both_towers_and_without_projection(tmp_path):
    found = encoder(sparse.write(tmp_path / "both.safetensors", sparse.both_towers()))
    assert sizes(found) == CARDS["ViT-H"] and not found.sizes.alone
    layout = dict(sparse.vision())
    del layout["visual_projection.weight"]
    found = encoder(sparse.write(tmp_path / "bare.safetensors", layout))
    assert sizes(found) == (0, *CARDS["ViT-H"][1:])


@pytest.mark.parametrize("name", ["ViT-H", "ViT-bigG", "ViT-g"])
@pytest.mark.parametrize("part", ["whole", "tower", "tower without prefix"])
def test_encoders_of_open_clip(name, part, tmp_path):
    layout = {
        "whole": sparse.clip(f"{name}-14"),
        "tower": sparse.tower(f"{name}-14", "visual."),
        "tower without prefix": sparse.tower(f"{name}-14"),
    }[part]
    found = encoder(sparse.write(tmp_path / "any.safetensors", layout))
    assert sizes(found) == CARDS[name]
    assert (found.sizes.layout, found.sizes.alone) == ("open_clip", part != "whole")


@pytest.mark.parametrize("where", ["inside", "beside", "in the folder", "nowhere"])
def test_the_configuration_of_a_tower_of_open_clip(where, tmp_path):
    text = json.dumps(sparse.config("ViT-L-14"))
    path = tmp_path / "any.safetensors"
    metadata = {"open_clip_config": text} if where == "inside" else None
    sparse.write(path, sparse.clip("ViT-L-14"), metadata)
    assert where == "inside" or "brings no configuration" in encoder(path).reason
    if where == "nowhere":
        return
    if where != "inside":
        name = "any.json" if where == "beside" else "open_clip_config.json"
        (tmp_path / name).write_text(text)
    assert sizes(encoder(path)) == CARDS["ViT-L"]


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_activation_that_the_configuration_asks_for(quick_gelu, tmp_path):
    text = json.dumps({**sparse.config("ViT-H-14"), "quick_gelu": quick_gelu})
    path = tmp_path / "any.safetensors"
    sparse.write(path, sparse.tower("ViT-H-14"), {"open_clip_config": text})
    assert encoder(path).sizes.quick_gelu is quick_gelu


@pytest.mark.parametrize("name, embed", [("RN50", 1024), ("convnext_base_w", 640)])
def test_towers_that_are_no_transformers(name, embed, tmp_path, monkeypatch):
    metadata = {"open_clip_config": json.dumps(sparse.config(name))}
    path = sparse.write(tmp_path / "any.safetensors", sparse.clip(name), metadata)
    assert sizes(encoder(path)) == (embed, 0, 0, 0, 0)
    monkeypatch.setattr(encoder_file, "find_spec", lambda _: None)
    finder._remembered.cache_clear()
    assert "not installed" in encoder(path).reason


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the system does not count bytes")
def test_only_headers_are_read(tmp_path):
    """Some gigabytes of tensors, of which not one byte is looked at."""
    layouts = [sparse.ADAPTERS["sdxl_plus"], sparse.vision("ViT-bigG"), sparse.clip()]
    paths = [sparse.write(tmp_path / f"{i}.safetensors", x) for i, x in enumerate(layouts)]
    assert sum(path.stat().st_size for path in paths) > 5e9
    before = read_by_this_process()
    found = [adapter(paths[0]), *map(encoder, paths[1:])]
    assert read_by_this_process() - before < 1e8  # pages of the heap count too
    assert not any(isinstance(file, finder.Unusable) for file in found)
    before = read_by_this_process()
    assert [adapter(paths[0]), *map(encoder, paths[1:])] == found
    assert read_by_this_process() - before < 1e6


def test_a_torch_file_is_mapped_and_not_read(tmp_path, monkeypatch):
    layout = sparse.ADAPTERS["sd15_full"]
    state = {key: torch.zeros(shape).half() for key, shape in layout.items()}
    torch.save(sections(state), tmp_path / "a.bin")
    real, asked = torch.load, []

    def load(*args, **how):
        asked.append(how)
        return real(*args, **how)

    monkeypatch.setattr(torch, "load", load)
    found = adapter(tmp_path / "a.bin")
    assert found.spec == adapter(sparse.write(tmp_path / "a.safetensors", layout)).spec
    assert adapter(tmp_path / "a.bin") == found
    (how,) = asked
    assert how["mmap"] and how["weights_only"] and how["map_location"] == "cpu"


def test_a_file_that_changed_is_looked_at_again(tmp_path):
    path = sparse.write(tmp_path / "a.safetensors", sparse.ADAPTERS["sd15"])
    assert adapter(path).spec.feature_dim == 1024
    sparse.write(path, sparse.ADAPTERS["sd15_vit-G"])
    assert adapter(path).spec.feature_dim == 1280
    path.write_bytes(b"")
    assert "empty" in adapter(path).reason
    path.unlink()
    assert "cannot be read" in adapter(path).reason


@pytest.mark.parametrize("option", ["image_encoder_path", "image_encoder"], ids=["now", "in 0.1"])
def test_what_training_noted(tmp_path, option):
    about = {option: "laion2b_s32b_b79k", "step": 3}
    metadata = {"ip_adapter": json.dumps(about)}
    path = sparse.write(tmp_path / "a.safetensors", sparse.ADAPTERS["sd15"], metadata)
    assert adapter(path).trained_with == "laion2b_s32b_b79k"
    for odd in ({"ip_adapter": "no JSON"}, {"ip_adapter": "[]"}, {"ip_adapter": "{}"}):
        path = sparse.write(tmp_path / "b.safetensors", sparse.ADAPTERS["sd15"], odd)
        assert adapter(path).trained_with is None


def cut(path, layout):
    sparse.write(path, layout)
    os.truncate(path, path.stat().st_size - 1)


def without(path, layout):
    sparse.write(path, dict(list(layout.items())[1:]))


BROKEN = {
    "empty": lambda path, _: path.write_bytes(b""),
    "cut short": cut,
    "cut inside its header": lambda path, _: path.write_bytes(b"\x80\1\0\0\0\0\0\0{" + b" " * 9),
    "a length of nothing": lambda path, _: path.write_bytes(b"\0" * 8 + b"{}"),
    "git-lfs": lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "web page": lambda path, _: path.write_text("<!doctype html><html></html>"),
    "text": lambda path, _: path.write_text("weights, soon"),
    "no JSON": lambda path, _: path.write_bytes(struct.pack("<Q", 9) + b"{" + b"x" * 8),
    "deep JSON": lambda path, _: path.write_bytes(
        struct.pack("<Q", 100_005) + b'{"a":' + b"[" * 100_000
    ),
    "a list": lambda path, _: path.write_bytes(struct.pack("<Q", 9) + b'{"a": [] ' + b"}"),
    "odd entries": lambda path, _: path.write_bytes(
        struct.pack("<Q", 52) + b'{"image_proj.latents":{"dtype":[],"shape":7,"x":[]}}'
    ),
    "no tensors": lambda path, _: sparse.write(path, {}),
    "foreign": lambda path, _: sparse.write(path, {"lora_up.weight": (4, 4)}),
    "not whole": without,
    "a folder's link": lambda path, _: path.symlink_to(path.parent / "gone"),
    "a folder": lambda path, _: path.mkdir(),
    "a broken zip": lambda path, _: path.write_bytes(b"PK\3\4" + b"\0" * 99),
    "a pickle": lambda path, _: torch.save(
        {"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False
    ),
    "code": lambda path, _: torch.save({"a": os.system}, path),
    "a list of torch": lambda path, _: torch.save([1, 2], path),
}


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("case", BROKEN)
def test_whatever_lies_there_is_named_and_skipped(case, ending, tmp_path):
    for look, layout in ((adapter, sparse.ADAPTERS["sd15"]), (encoder, sparse.vision())):
        path = tmp_path / look.__name__ / f"odd{ending}"
        path.parent.mkdir()
        BROKEN[case](path, layout)
        found = look(path)
        assert isinstance(found, finder.Unusable)
        assert f"odd{ending}" in found.reason


@pytest.mark.parametrize(
    "look, layout",
    [
        (adapter, sparse.ADAPTERS["sd15"]),
        (encoder, sparse.vision("ViT-L")),
        (encoder, sparse.tower("ViT-H-14")),
    ],
)
def test_a_quantised_file_is_none(look, layout, tmp_path):
    path = sparse.write(tmp_path / "a.safetensors", layout)
    with open(path, "r+b") as opened:
        header = opened.read(header_bytes(path))
        opened.seek(0)
        opened.write(header.replace(b'"F16"', b'"I16"'))
    assert "I16" in look(path).reason and "unquantised" in look(path).reason


SIGLIP_PATCHES = "vision_model.embeddings.patch_embedding.weight"


@pytest.mark.parametrize(
    "layout, reason",
    [
        (sparse.siglip() | {SIGLIP_PATCHES: (8, 768)}, "SigLIP 2"),
        ({"vision_model.embeddings.class_embedding": (8,)}, "another kind than CLIP"),
        ({"encoder.layer.0.layer_scale2.lambda1": (8,)}, "none of its 1 tensors belongs"),
        (sparse.ADAPTERS["sd15"], "belongs to an image tower"),
    ],
)
def test_encoders_of_other_kinds(layout, reason, tmp_path):
    assert reason in encoder(sparse.write(tmp_path / "a.safetensors", layout)).reason


@pytest.mark.parametrize("name", ["vision", "clip"])
def test_an_encoder_with_a_tensor_missing_or_of_another_shape(name, tmp_path):
    """The host's loader takes the first and leaves noise in its place."""
    whole = getattr(sparse, name)()
    inner = [key for key in whole if key.startswith(("vision_model.", "visual."))]
    for key in (inner[0], inner[7], inner[-1]):
        missing = {k: x for k, x in whole.items() if k != key}
        wider = {**whole, key: (*whole[key][:-1], whole[key][-1] + 1)}
        for layout in (missing, wider):
            found = encoder(sparse.write(tmp_path / "a.safetensors", layout))
            assert isinstance(found, finder.Unusable), key


def test_the_contents_decide_whatever_the_ending_says(tmp_path):
    named = encoder(sparse.write(tmp_path / "a.safetensors", sparse.vision()))
    assert encoder(sparse.write(tmp_path / "a.bin", sparse.vision())).sizes == named.sizes
    torch.save({"vision_model.x": torch.ones(1)}, tmp_path / "b.safetensors")
    assert "another kind than CLIP" in encoder(tmp_path / "b.safetensors").reason
    state = {key: torch.rand(shape).half() for key, shape in sparse.ADAPTERS["sd15"].items()}
    torch.save(state, tmp_path / "c.safetensors")
    assert adapter(tmp_path / "c.safetensors").spec.feature_dim == 1024


def wrapped(kind):
    error = kind("'a' cannot be read")
    error.__cause__ = OSError(5, "Input/output error")
    return error


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """An adapter and an encoder, the first look at which fails as told; what both looks find."""
    files = {
        "adapters": sparse.write(tmp_path / "a.safetensors", sparse.ADAPTERS["sd15"]),
        "encoders": sparse.write(tmp_path / "e.safetensors", sparse.vision()),
    }
    opening = {"adapters": "read_header", "encoders": "encoder_sizes"}

    def look(kind, error):
        real, errors = getattr(finder, opening[kind]), [error]

        def first_fails(path):
            if errors:
                raise errors.pop()
            return real(path)

        monkeypatch.setattr(finder, opening[kind], first_fails)
        file = finder.File(files[kind].name, str(files[kind]))
        search = getattr(finder, kind)
        return lambda: search([file])[0]

    return look


@pytest.mark.parametrize("kind", ["adapters", "encoders"])
@pytest.mark.parametrize(
    "error, again",
    [
        (OSError(116, "Stale file handle"), True),
        (PermissionError(13, "Permission denied"), True),
        (wrapped(CheckpointError), True),
        (wrapped(ImageEncoderError), True),
        (RuntimeError("damaged"), False),
        (CheckpointError("'a' is damaged"), False),
    ],
    ids=repr,
)
def test_only_what_the_machine_could_not_do_is_tried_again(failing, kind, error, again):
    find = failing(kind, error)
    assert str(error) in find().reason
    assert isinstance(find(), finder.Unusable) is not again


@pytest.mark.parametrize("kind", ["adapters", "encoders"])
def test_a_full_memory_is_no_finding_about_a_file(failing, kind):
    found = failing(kind, MemoryError())
    with pytest.raises(MemoryError):
        found()
    assert not isinstance(found(), finder.Unusable)
