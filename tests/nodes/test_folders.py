"""Where adapters are looked for, and when a file is read again."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def load(nodes):
    return nodes["IPA_LoadAdapter"]


def listed(load):
    return load.GET_NODE_INFO_V1()["input"]["required"]["adapter_name"][1]["options"]


def test_lists_every_kind_of_file_in_every_folder(load, folder):
    for name in ("b.safetensors", "a.bin", "c.pt", "notes.txt", "deeper/d.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    deeper = os.path.join("deeper", "d.safetensors")
    assert listed(load) == ["a.bin", "b.safetensors", "c.pt", deeper]


@pytest.mark.parametrize("there", [True, False])
def test_an_empty_folder_and_none_at_all(load, folder, there):
    if not there:
        folder.rmdir()
    assert listed(load) == []


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
        assert listed(load) == ["own.bin"]
    load_extra_path_config(str(yaml))
    assert listed(load) == ["extra.safetensors", "own.bin"]
    adapter = load.execute("extra.safetensors").args[0]
    assert adapter.name == "extra.safetensors"
    weights = adapter.module.state_dict()
    for key, weight in module.state_dict().items():
        assert torch.equal(weights[key], weight.half())


@pytest.mark.parametrize("ask", ["execute", "fingerprint_inputs"])
def test_a_missing_file_names_the_folders_searched(load, folder, tmp_path, ask):
    import folder_paths

    folder_paths.add_model_folder_path("ipadapter", str(tmp_path / "second"))
    with pytest.raises(FileNotFoundError) as error:
        getattr(load, ask)(adapter_name="gone.safetensors")
    for word in ("gone.safetensors", str(folder), str(tmp_path / "second")):
        assert word in str(error.value)


def test_a_path_cannot_leave_the_folder(load, folder, tmp_path, saved):
    saved(tmp_path / "outside.safetensors")
    with pytest.raises(FileNotFoundError):
        load.execute(adapter_name="../outside.safetensors")


def test_the_fingerprint_follows_the_file(load, folder, saved):
    path = folder / "a.safetensors"
    saved(path, seed=1)

    def fingerprint():
        return load.fingerprint_inputs(adapter_name="a.safetensors")

    first = fingerprint()
    assert fingerprint() == first
    times = path.stat()
    saved(path, seed=2)  # another file of the same size and name
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
    second = fingerprint()
    assert second != first
    saved(path, tokens=5)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
    assert fingerprint() not in (first, second)
    saved(folder / "b.safetensors", seed=1)
    assert load.fingerprint_inputs(adapter_name="b.safetensors") != first


def test_the_fingerprint_of_a_name_over_a_link(load, folder):
    """The host gives None for it; whatever it raised would have the node run each time."""
    assert load.fingerprint_inputs(adapter_name=None) is None


def test_a_damaged_file_is_named(load, folder):
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        load.execute(adapter_name="cut.safetensors")
