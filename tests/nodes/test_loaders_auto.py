"""IPA_AutoLoad from files to a sampled picture, and when it looks again."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tests.support import small_models
from tests.support import sparse_files as sparse

SIDE = small_models.SIDE


@pytest.fixture
def auto(nodes):
    return nodes["IPA_AutoLoad"]


@pytest.fixture
def fingerprint(auto):
    return lambda preset="standard": auto.fingerprint_inputs(model=None, preset=preset)


@pytest.fixture
def tower(small, encoders):
    """Save a small open_clip model with its configuration inside."""

    def tower(name, width=64, embed=small.EMBED):
        sizes = {"width": width, "embed": embed}
        state = small_models.open_clip_model(**sizes).state_dict()
        config = json.dumps({"model_cfg": small_models.open_clip_config(**sizes)})
        tensors = {key: x.contiguous() for key, x in state.items()}
        save_file(tensors, encoders / name, {"open_clip_config": config})

    return tower


@pytest.fixture
def resampler(small):
    """Save a random plus adapter."""
    from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter
    from comfyui_ip_adapter.ip_adapter_core.files import adapter_file as checkpoint

    def resampler(path):
        sizes = {"feature_dim": 64, "cross_attention_dim": small.CONTEXT, "tokens": 4, "dim": 64}
        sizes |= {"depth": 1, "heads": 1, "expansion": 2}
        widths = tuple(width for _, width in small.SD15_LAYERS)
        module = IPAdapter(AdapterSpec("plus", tuple(sizes.items()), widths))
        checkpoint.save(small.fill(module, seed=11), path, {})

    return resampler


def test_from_files_to_a_sampled_picture(small, auto, nodes, folder, tower, saved, resampler):
    """The same picture as with the files chosen by hand."""
    saved(folder / "x.safetensors", seed=1)
    saved(folder / "y.safetensors", family="sdxl", seed=2)
    resampler(folder / "standard.safetensors")
    tower("e.safetensors")
    tower("wide.safetensors", width=96)
    model, texts = small.model(), (small.text(1), small.text(2))
    pictures = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(3))

    def sampled(adapter, clip_vision):
        prompt = nodes["IPA_EncodeImage"].execute(clip_vision, pictures, "center").args[0]
        return small.run(small.guider(small.apply(model, adapter, prompt), *texts))

    plain = small.run(small.guider(model, *texts))
    for preset, name in (("standard", "x.safetensors"), ("fine-grained", "standard.safetensors")):
        adapter, clip_vision, chosen = auto.execute(model, preset).args
        assert adapter.name == name and clip_vision.model_type == "clip_vision_model"
        of_adapter, of_encoder, *doubts = chosen.splitlines()
        assert name in of_adapter and "e.safetensors" in of_encoder
        assert len(doubts) == (preset == "standard")  # which could read the wide encoder too
        assert all("In doubt: 'wide.safetensors' fits as well" in doubt for doubt in doubts)
        by_hand = (
            nodes["IPA_LoadAdapter"].execute(name).args[0],
            nodes["IPA_LoadImageEncoder"].execute("e.safetensors").args[0],
        )
        found = sampled(adapter, clip_vision)
        assert torch.equal(found, sampled(*by_hand))
        assert not torch.allclose(found, plain, atol=1e-2)
    assert auto.execute(small.model("sdxl"), "standard").args[0].name == "y.safetensors"


def test_files_of_torch(small, auto, folder, encoders):
    state = small.adapter().module.state_dict()
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"'old\.bin': .*before 1\.6"):
        auto.execute(small.model(), "standard")
    torch.save(state, folder / "x.bin")
    model = small_models.open_clip_model(embed=small.EMBED)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, encoders / "e.pt")
    config = small_models.open_clip_config(embed=small.EMBED)
    (encoders / "e.json").write_text(json.dumps(config))
    adapter, clip_vision, chosen = auto.execute(small.model(), "standard").args
    assert "x.bin" in chosen and "e.pt" in chosen
    weight = "ip_adapter.3.to_k_ip.weight"
    assert torch.equal(adapter.module.state_dict()[weight], state[weight])
    assert clip_vision.image_size == SIDE


def test_the_fingerprint_follows_the_folders(fingerprint, folder, encoders, tmp_path, tower, saved):
    import folder_paths

    seen = [fingerprint()]

    def changed():
        seen.append(fingerprint())
        assert fingerprint() == seen[-1]
        return seen[-1] not in seen[:-1]

    assert not changed()
    saved(folder / "x.safetensors")
    assert changed()
    tower("e.safetensors")
    assert changed()
    (encoders / "e.json").write_text("{}")
    assert changed()
    times = (folder / "x.safetensors").stat()
    os.utime(folder / "x.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
    assert changed()
    (folder / "dead.safetensors").symlink_to(folder / "gone")
    fingerprint()  # raises nothing
    saved(folder / "y.safetensors")
    assert changed()
    (folder / "x.safetensors").unlink()
    assert changed()
    (tmp_path / "second").mkdir()
    folder_paths.add_model_folder_path("ipadapter", str(tmp_path / "second"))
    saved(tmp_path / "second" / "x.safetensors")
    assert changed()


def test_the_fingerprint_knows_what_cannot_be_chosen(
    small, fingerprint, folder, encoders, tower, saved, resampler
):
    """A download that grows does not have gigabytes read again in every queue."""
    saved(folder / "x.safetensors")
    tower("e.safetensors")
    before = fingerprint()
    for place, whole in ((folder, "x.safetensors"), (encoders, "e.safetensors")):
        data = (place / whole).read_bytes()
        for size in (0, 100, len(data) - 1):
            (place / "growing.safetensors").write_bytes(data[:size])
            assert fingerprint() == before
    resampler(folder / "plus.safetensors")
    tower("wide.safetensors", embed=small.EMBED + 8)
    assert fingerprint() == before  # another kind, and an encoder that no adapter here reads
    assert fingerprint("fine-grained") != before
    whole = (folder / "x.safetensors").read_bytes()
    (folder / "growing.safetensors").write_bytes(whole)
    assert fingerprint() != before


def test_the_fingerprint_of_a_preset_over_a_link(fingerprint, folder, tower, saved):
    """The host gives None for it; whatever it raised would have the node run each time."""
    saved(folder / "x.safetensors")
    tower("e.safetensors")
    linked = fingerprint(None)
    assert linked == fingerprint("standard") == fingerprint(None)
    assert isinstance(linked, str) and "/" not in linked  # the host writes it into saved pictures


def test_transformers_layout_goes_to_the_hosts_loader(put, monkeypatch):
    """What the header tells is what the loaded encoder gives."""
    import comfy.clip_vision
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_encoder
    from comfyui_ip_adapter.ip_adapter_core.files import finder
    from comfyui_ip_adapter.nodes import paths

    put({}, {"l.safetensors": sparse.vision("ViT-L")})
    (file,) = finder.encoders(paths.encoders().files)
    out = load_encoder(file).encode_image(torch.rand(1, 224, 224, 3))
    assert out["image_embeds"].shape == (1, file.sizes.embed_dim)
    hidden = file.sizes.positions, file.sizes.hidden_dim
    assert out["penultimate_hidden_states"].shape == (1, *hidden)
    monkeypatch.setattr(comfy.clip_vision, "load", lambda path: None)
    with pytest.raises(ValueError, match=r"'l\.safetensors' is of a size"):
        load_encoder(file)
