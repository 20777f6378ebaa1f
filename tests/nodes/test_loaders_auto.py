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
def tower(small, encoders):
    """Save a small open_clip model with its configuration inside, and return it."""

    def tower(name, width=64, embed=small.EMBED):
        model = small_models.open_clip_model(width=width, embed=embed)
        model.load_state_dict({k: x.half().float() for k, x in model.state_dict().items()})
        config = small_models.open_clip_config(width=width, embed=embed)
        state = {key: x.contiguous() for key, x in model.state_dict().items()}
        metadata = {"open_clip_config": json.dumps({"model_cfg": config})}
        save_file(state, encoders / name, metadata)
        return model

    return tower


def pictures():
    return torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(3))


def resampler(small):
    from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter

    sizes = {"feature_dim": 64, "cross_attention_dim": small.CONTEXT, "tokens": 4, "dim": 64}
    sizes |= {"depth": 1, "heads": 1, "expansion": 2}
    widths = tuple(width for _, width in small.SD15_LAYERS)
    module = IPAdapter(AdapterSpec("plus", tuple(sizes.items()), widths))
    small.fill(module.requires_grad_(False), seed=11)
    return module


def test_from_files_to_a_sampled_picture(small, auto, nodes, folder, tower, saved):
    """The same picture as with the files chosen by hand."""
    from comfyui_ip_adapter.ip_adapter_core.files import adapter_file as checkpoint

    saved(folder / "x.safetensors", seed=1)
    saved(folder / "y.safetensors", family="sdxl", seed=2)
    checkpoint.save(resampler(small), folder / "standard.safetensors", {})
    tower("e.safetensors")
    tower("wide.safetensors", width=96)
    model, texts = small.model(), (small.text(1), small.text(2))
    encode = nodes["IPA_EncodeImage"].execute

    def sampled(adapter, clip_vision):
        prompt = encode(clip_vision, pictures(), "center").args[0]
        return small.run(small.guider(small.apply(model, adapter, prompt), *texts))

    plain = small.run(small.guider(model, *texts))
    for preset, name in (("standard", "x.safetensors"), ("fine-grained", "standard.safetensors")):
        adapter, clip_vision, chosen = auto.execute(model, preset).args
        assert adapter.name == name and clip_vision.model_type == "clip_vision_model"
        lines = chosen.splitlines()
        assert name in lines[0] and "e.safetensors" in lines[1]
        assert len(lines) == (3 if preset == "standard" else 2)  # of the other it reads too
        by_hand = (
            nodes["IPA_LoadAdapter"].execute(name).args[0],
            nodes["IPA_LoadImageEncoder"].execute("e.safetensors").args[0],
        )
        found = sampled(adapter, clip_vision)
        assert torch.equal(found, sampled(*by_hand))
        assert not torch.allclose(found, plain, atol=1e-2)
    assert auto.execute(small.model("sdxl"), "standard").args[0].name == "y.safetensors"


def test_the_encoder_is_the_files(small, auto, folder, tower, saved):
    """Its embeddings are those of open_clip itself."""
    saved(folder / "x.safetensors")
    model = tower("e.safetensors")
    clip_vision = auto.execute(small.model(), "standard").args[1]
    colours = torch.tensor([clip_vision.image_mean, clip_vision.image_std])
    whole = (pictures() * 255).round() / 255
    normal = ((whole - colours[0]) / colours[1]).movedim(-1, 1)
    found = clip_vision.encode_image(whole)["image_embeds"]
    torch.testing.assert_close(found, model.visual(normal), rtol=1e-3, atol=1e-3)


def test_the_tower_alone_with_its_configuration_beside(small, auto, folder, encoders, tower, saved):
    saved(folder / "x.safetensors")
    model = tower("e.safetensors")
    state = {key: x.contiguous() for key, x in model.visual.state_dict().items()}
    save_file(state, encoders / "e.safetensors")
    with pytest.raises(FileNotFoundError, match="brings no configuration"):
        auto.execute(small.model(), "standard")
    config = small_models.open_clip_config(embed=small.EMBED)
    (encoders / "e.json").write_text(json.dumps(config))
    assert auto.execute(small.model(), "standard").args[1].image_size == SIDE


def test_what_is_in_doubt_is_in_the_text(small, auto, folder, tower, saved):
    saved(folder / "x.safetensors", seed=1)
    saved(folder / "y.safetensors", seed=2)
    tower("e.safetensors")
    chosen = auto.execute(small.model(), "standard").args[2].splitlines()
    assert len(chosen) == 3
    assert chosen[2].startswith("In doubt: 'y.safetensors' fits as well as 'x.safetensors'")


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch(small, auto, folder, encoders, tower, legacy):
    module, model = small.adapter().module, tower("e.safetensors")
    (encoders / "e.safetensors").unlink()
    tree: dict = {}
    for key, value in module.state_dict().items():
        section, name = key.split(".", 1)
        tree.setdefault(section, {})[name] = value
    how = {"_use_new_zipfile_serialization": not legacy}
    torch.save(tree, folder / "x.bin", **how)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, encoders / "e.pt")
    config = small_models.open_clip_config(embed=small.EMBED)
    (encoders / "e.json").write_text(json.dumps(config))
    if legacy:
        with pytest.raises(FileNotFoundError, match=r"'x\.bin': .*before 1\.6"):
            auto.execute(small.model(), "standard")
        return
    adapter, clip_vision, chosen = auto.execute(small.model(), "standard").args
    assert "x.bin" in chosen and "e.pt" in chosen
    assert torch.equal(
        adapter.module.ip_adapter["3"].to_k_ip.weight, tree["ip_adapter"]["3.to_k_ip.weight"]
    )
    assert clip_vision.image_size == SIDE


def test_transformers_layout_goes_to_the_hosts_loader(auto, real, put, monkeypatch, saved, folder):
    import comfy.clip_vision
    from comfyui_ip_adapter.nodes import loaders

    asked = []
    monkeypatch.setattr(comfy.clip_vision, "load", lambda path: asked.append(path) or "loaded")
    monkeypatch.setattr(loaders, "load_adapter", lambda path: path)
    put({"a.safetensors": "sd15"}, {"h.safetensors": sparse.vision()})
    adapter, clip_vision, _ = auto.execute(real["SD1.5"], "standard").args
    assert adapter == str(folder / "a.safetensors")
    assert clip_vision == "loaded" and asked == [str(folder.parent / "clip_vision/h.safetensors")]
    monkeypatch.setattr(comfy.clip_vision, "load", lambda path: None)
    with pytest.raises(ValueError, match=r"'h\.safetensors' is of a size"):
        auto.execute(real["SD1.5"], "standard")


def test_broken_files_beside_are_passed_over(small, auto, folder, encoders, tower, saved):
    saved(folder / "x.safetensors")
    tower("e.safetensors")
    for place, whole in ((folder, "x.safetensors"), (encoders, "e.safetensors")):
        data = (place / whole).read_bytes()
        (place / "a.safetensors").write_bytes(data[:-1])
        (place / "a.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
        (place / "b.bin").write_bytes(b"PK\3\4" + b"\0" * 99)
        (place / "c.pt").touch()
        (place / "d.safetensors").symlink_to(place / "gone")
    chosen = auto.execute(small.model(), "standard").args[2]
    assert "'x.safetensors'" in chosen and "'e.safetensors'" in chosen


def test_the_fingerprint_follows_the_folders(auto, folder, encoders, tower, saved):
    def fingerprint():
        return auto.fingerprint_inputs(model=None, preset="standard")

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


def test_the_fingerprint_knows_what_cannot_be_chosen(small, auto, folder, encoders, tower, saved):
    """A download that grows does not have gigabytes read again in every queue."""
    from comfyui_ip_adapter.ip_adapter_core.files import adapter_file as checkpoint

    def fingerprint(preset="standard"):
        return auto.fingerprint_inputs(model=None, preset=preset)

    saved(folder / "x.safetensors")
    tower("e.safetensors")
    before = fingerprint()
    for place, whole in ((folder, "x.safetensors"), (encoders, "e.safetensors")):
        data = (place / whole).read_bytes()
        for size in (0, 100, len(data) - 1):
            (place / "growing.safetensors").write_bytes(data[:size])
            assert fingerprint() == before
    checkpoint.save(resampler(small), folder / "plus.safetensors", {})
    tower("wide.safetensors", embed=small.EMBED + 8)
    assert fingerprint() == before  # another kind, and an encoder that no adapter here reads
    assert fingerprint("fine-grained") != before
    whole = (folder / "x.safetensors").read_bytes()
    (folder / "growing.safetensors").write_bytes(whole)
    assert fingerprint() != before


def test_the_fingerprint_of_a_preset_over_a_link(auto, folder, tower, saved):
    """The host gives None for it; whatever it raised would have the node run each time."""
    saved(folder / "x.safetensors")
    tower("e.safetensors")
    linked = auto.fingerprint_inputs(model=None, preset=None)
    assert linked == auto.fingerprint_inputs(model=None, preset="standard")
    assert isinstance(linked, str) and "/" not in linked  # the host writes it into saved pictures
    assert auto.fingerprint_inputs(model=None, preset=None) == linked


def test_the_extra_folders_of_the_host(small, auto, folder, tmp_path, tower, saved):
    import folder_paths

    tower("e.safetensors")
    before = auto.fingerprint_inputs()
    (tmp_path / "second").mkdir()
    folder_paths.add_model_folder_path("ipadapter", str(tmp_path / "second"))
    saved(tmp_path / "second" / "x.safetensors")
    assert auto.fingerprint_inputs() != before
    assert auto.execute(small.model(), "standard").args[0].name == "x.safetensors"


def test_a_real_size_through_the_hosts_own_loader(auto, folder, put):
    """What the header tells is what the loaded encoder gives."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_encoder
    from comfyui_ip_adapter.ip_adapter_core.files import finder
    from comfyui_ip_adapter.nodes import paths

    put({}, {"l.safetensors": sparse.vision("ViT-L")})
    (file,) = finder.encoders(paths.encoders().files)
    out = load_encoder(file).encode_image(torch.rand(1, 224, 224, 3))
    assert out["image_embeds"].shape == (1, file.sizes.embed_dim)
    hidden = file.sizes.positions, file.sizes.hidden_dim
    assert out["penultimate_hidden_states"].shape == (1, *hidden)
