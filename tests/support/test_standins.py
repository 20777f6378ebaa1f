"""The stand-ins: the same bytes every time, in layouts that ComfyUI's own loaders accept."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support import checkpoint_layouts as layouts
from tests.support import standins
from tests.support.standins import Model
from tools import reference_images


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, and small stand-ins to fill it with."""
    monkeypatch.setenv(standins.FOLDER_VARIABLE, str(tmp_path))
    small = layouts.linear_projection(8, 4)
    adapter = layouts.ip_adapter(small, [6, 6], 4)
    build = lambda: standins.half(adapter, 0)  # noqa: E731
    models = {
        "one": Model(
            "ipadapter/one.safetensors", "few", build, also=("ipadapter/same.safetensors",)
        ),
        "two": Model("ipadapter/two.bin", "few", build),
        "three": Model("ipadapter/three.safetensors", "other", build),
    }
    monkeypatch.setattr(standins, "MODELS", models)
    monkeypatch.setattr(standins, "GROUPS", {"few": ("few",)})
    return tmp_path


def digests(base: Path) -> dict[str, str]:
    files = [path for path in base.rglob("*") if path.suffix in (".png", ".safetensors", ".bin")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_made_twice_the_bytes_are_the_same(elsewhere, monkeypatch):
    first = digests(standins.ensure("few"))
    assert set(first) == {
        "one.safetensors",
        "same.safetensors",
        "two.bin",
        *reference_images.SCENES,
    }
    monkeypatch.setattr(standins, "VERSION", standins.VERSION + 1)
    assert digests(standins.ensure("few")) == first


def test_only_what_is_missing_or_of_another_version_is_made(elsewhere, monkeypatch):
    base = standins.ensure("one")
    file = base / "models" / "ipadapter" / "one.safetensors"
    file.write_bytes(b"kept")
    standins.ensure("few")
    assert file.read_bytes() == b"kept"
    monkeypatch.setattr(standins, "VERSION", standins.VERSION + 1)
    standins.ensure("one")
    assert len(load_file(file)) == 8
    assert not list(base.rglob("*.tmp"))


def test_an_interrupted_file_is_not_taken_for_a_whole_one(elsewhere, monkeypatch):
    def interrupted(*args, **options):
        Path(args[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(standins, "save_file", interrupted)
        standins.ensure("one")
    assert not standins.path("one").exists()
    standins.ensure("one")
    assert len(load_file(standins.path("one"))) == 8


def test_an_unknown_name_is_refused_with_the_known_ones(elsewhere):
    with pytest.raises(KeyError, match=r"no stand-in model or group 'sd9'.*few, one, two"):
        standins.ensure("sd9")


def test_the_bin_file_holds_the_same_in_two_levels(models):
    flat = load_file(standins.path("adapter"))
    nested = torch.load(standins.path("adapter_bin"), weights_only=True)
    assert set(nested) == {"image_proj", "ip_adapter"}
    for key, tensor in flat.items():
        group, _, rest = key.partition(".")
        assert torch.equal(nested[group][rest], tensor)


@pytest.mark.parametrize("name", ["adapter", "adapter_plus", "adapter_full"])
def test_adapters_have_published_keys_and_four_layers(models, name):
    with safe_open(standins.path(name), "pt") as file:
        layers = {key for key in file.keys() if key.startswith("ip_adapter.")}  # noqa: SIM118
        assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118
    expected = {f"ip_adapter.{n}.to_{x}_ip.weight" for n in (1, 3, 5, 7) for x in "kv"}
    assert layers == expected


def test_layer_counts_are_those_of_the_families():
    assert len(standins.SD15.widths) == 4
    assert len(standins.SDXL.widths) == 70


class TestHostLoads:
    """Through ComfyUI's loaders: recognised, complete, and their pictures are pictures."""

    @pytest.fixture(scope="class")
    def loaded(self, host, models):
        import nodes

        name = standins.path("checkpoint").name
        return nodes.CheckpointLoaderSimple().load_checkpoint(name)

    @pytest.fixture(autouse=True)
    def nothing_missing(self, caplog):
        with caplog.at_level(logging.WARNING), torch.no_grad():
            yield
        assert not [r.getMessage() for r in caplog.records if "missing" in r.getMessage().lower()]

    def test_checkpoint_and_sampling(self, host, loaded):
        import nodes

        model, clip, vae = loaded
        assert type(model.model.model_config).__name__ == "SD15"
        positive, negative = (
            nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a hat on the beach", "")
        )
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        settings = (0, 2, 7.5, "ddim", "ddim_uniform")
        sampled = nodes.common_ksampler(model, *settings, positive, negative, latent)[0]
        picture = vae.decode(sampled["samples"])
        assert picture.isfinite().all()
        assert picture.std() > 0.05
        assert ((picture > 0.02) & (picture < 0.98)).float().mean() > 0.5

    @pytest.mark.nightly
    def test_image_encoder_tells_pictures_apart(self, host, models):
        import numpy as np

        import nodes

        name = standins.path("clip_vision").name
        encoder = nodes.CLIPVisionLoader().load_clip(name)[0]
        scenes = [np.asarray(reference_images.draw(f"reference{n}.png")) for n in ("", "_2")]
        images = torch.from_numpy(np.stack(scenes)).float() / 255
        embeds = encoder.encode_image(images)["image_embeds"]
        assert embeds.shape == (2, 768)
        assert torch.cosine_similarity(*embeds, dim=0) < 0.9

    def test_controlnet(self, host, models):
        import nodes

        name = standins.path("controlnet").name
        control = nodes.ControlNetLoader().load_controlnet(name)[0]
        assert len(control.control_model.zero_convs) == 2
