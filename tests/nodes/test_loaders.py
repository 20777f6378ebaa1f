"""IPA_LoadAdapter and IPA_LoadImageEncoder: which files they offer, when one is read again."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tests.support import small_models

NAME = "small.safetensors"


@pytest.fixture
def load(nodes):
    return nodes["IPA_LoadAdapter"]


@pytest.fixture
def load_encoder(nodes):
    return nodes["IPA_LoadImageEncoder"]


def options(node, name):
    return node.GET_NODE_INFO_V1()["input"]["required"][name][1]["options"]


def touched(path):
    """A microsecond later."""
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))


def test_lists_every_kind_of_file_in_every_folder(load, folder):
    assert options(load, "adapter_name") == []
    for name in ("b.safetensors", "a.bin", "c.pt", "notes.txt", "deeper/d.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    deeper = os.path.join("deeper", "d.safetensors")
    assert options(load, "adapter_name") == ["a.bin", "b.safetensors", "c.pt", deeper]


def test_no_folder_at_all(load, folder):
    folder.rmdir()
    assert options(load, "adapter_name") == []


@pytest.mark.parametrize("first", ["the yaml file", "the pack"])
def test_extra_model_paths_yaml(load, folder, tmp_path, saved, first):
    """The host reads the file before it loads packs; both orders must do."""
    from utils.extra_config import load_extra_path_config

    extra = tmp_path / "elsewhere" / "adapters"
    extra.mkdir(parents=True)
    module = saved(extra / "extra.safetensors")
    (folder / "own.bin").touch()
    yaml = tmp_path / "extra_model_paths.yaml"
    yaml.write_text("elsewhere:\n  base_path: elsewhere\n  ipadapter: adapters\n")
    if first == "the pack":
        assert options(load, "adapter_name") == ["own.bin"]
    load_extra_path_config(str(yaml))
    assert options(load, "adapter_name") == ["extra.safetensors", "own.bin"]
    adapter = load.execute("extra.safetensors").args[0]
    assert adapter.name == "extra.safetensors"
    weights = adapter.module.state_dict()
    for key, weight in module.state_dict().items():
        assert torch.equal(weights[key], weight.half())


def test_the_fingerprint_follows_the_file(load, folder, saved):
    def fingerprint():
        return load.fingerprint_inputs(adapter_name="a.safetensors")

    path = folder / "a.safetensors"
    saved(path)
    first = fingerprint()
    assert fingerprint() == first
    touched(path)
    second, times = fingerprint(), path.stat()
    assert second != first
    saved(path, tokens=5)  # of another size, at the same time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint() not in (first, second)


@pytest.mark.parametrize("kind", ["adapter", "encoder"])
def test_names_that_lead_nowhere_or_come_over_a_link(nodes, folder, encoders, tmp_path, kind):
    """A missing file names the folders searched. Over a link the host gives None for a name:
    whatever the fingerprint raised would have the node run each time."""
    import folder_paths

    node = nodes[{"adapter": "IPA_LoadAdapter", "encoder": "IPA_LoadImageEncoder"}[kind]]
    key, own = {"adapter": ("ipadapter", folder), "encoder": ("clip_vision", encoders)}[kind]
    folder_paths.add_model_folder_path(key, str(tmp_path / "second"))
    for ask in (node.execute, node.fingerprint_inputs):
        with pytest.raises(FileNotFoundError) as error:
            ask(**{f"{kind}_name": "gone.safetensors"})
        for word in ("gone.safetensors", str(own), str(tmp_path / "second"), "refresh"):
            assert word in str(error.value)
    (tmp_path / "outside.safetensors").touch()
    with pytest.raises(FileNotFoundError):
        node.execute(**{f"{kind}_name": "../outside.safetensors"})
    assert node.fingerprint_inputs(**{f"{kind}_name": None}) is None


@pytest.fixture
def small_encoder(encoders):
    """A model of open_clip with its configuration beside it; the folder."""
    state = small_models.open_clip_model().state_dict()
    save_file({key: x.contiguous() for key, x in state.items()}, encoders / NAME)
    (encoders / "small.json").write_text(json.dumps(small_models.open_clip_config()))
    return encoders


def test_it_offers_the_hosts_image_encoders_and_loads_one(load_encoder, small_encoder):
    assert options(load_encoder, "encoder_name") == [NAME]
    (encoder,) = load_encoder.execute(NAME).args
    assert (encoder.image_size, encoder.model_type) == (small_models.SIDE, "clip_vision_model")


@pytest.mark.parametrize("which", [NAME, "small.json", "open_clip_config.json"])
def test_the_encoders_fingerprint_follows_the_file_and_its_configuration(
    load_encoder, small_encoder, which
):
    """It tells no folder: the host writes it into every picture that is saved."""
    (small_encoder / "open_clip_config.json").write_text("{}")
    first = load_encoder.fingerprint_inputs(encoder_name=NAME)
    assert load_encoder.fingerprint_inputs(encoder_name=NAME) == first
    assert isinstance(first, str)
    assert not any(part in first for part in ("/", os.sep, "small"))
    touched(small_encoder / which)
    assert load_encoder.fingerprint_inputs(encoder_name=NAME) != first


@pytest.mark.parametrize("layers, width", [(31, 1408), (22, 768)])
def test_a_size_of_transformers_that_the_host_does_not_know(load_encoder, encoders, layers, width):
    """It takes such a file for one of the nearest size that it knows, or for none."""
    last = f"vision_model.encoder.layers.{layers - 1}"
    state = {
        **{f"{last}.layer_norm1.{name}": torch.ones(width) for name in ("weight", "bias")},
        "vision_model.embeddings.position_embedding.weight": torch.ones(257, width),
        "vision_model.embeddings.patch_embedding.weight": torch.ones(width, 3, 14, 14),
        "visual_projection.weight": torch.ones(1024, width),
    }
    save_file(state, encoders / NAME)
    with pytest.raises(ValueError, match=f"'{NAME}'.*in a size that ComfyUI does not know"):
        load_encoder.execute(NAME)


def test_short_memory_is_not_taken_for_an_unknown_size(load_encoder, encoders, monkeypatch):
    import comfy.clip_vision

    def fail(path):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    save_file({"vision_model.embeddings.class_embedding": torch.ones(8)}, encoders / NAME)
    monkeypatch.setattr(comfy.clip_vision, "load", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        load_encoder.execute(NAME)


def test_adapters_of_the_packs_for_flux(nodes, flux, folder, monkeypatch):
    """Where those packs have their files, or say that they have them, the node lists them too."""
    import folder_paths
    from safetensors.torch import save_file

    elsewhere = folder.parent / "elsewhere"
    places = {
        "v1": folder.parent / "xlabs" / "ipadapters",
        "v2": elsewhere,
        "instantx": folder.parent / "ipadapter-flux",
    }
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "xlabs_ipadapters", ([str(elsewhere)], {".safetensors"}))
    for name, place in places.items():
        place.mkdir(parents=True)
        state = flux.instantx() if name == "instantx" else flux.xlabs()
        save_file(state, place / f"{name}.safetensors")
    node = nodes["IPA_LoadAdapter"]
    (chosen,) = (x for x in node.GET_SCHEMA().inputs if x.id == "adapter_name")
    assert {f"{name}.safetensors" for name in places} <= {*chosen.options}
    for name in places:
        spec = node.execute(f"{name}.safetensors").args[0].spec
        place = "attention output" if name == "instantx" else "block output"
        assert spec.place == place
