"""The stand-ins: the same bytes every time, in layouts that ComfyUI's own loaders accept."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import checkpoint_layouts as layouts
from tests.support import standins
from tests.support.standins import Model
from tools import reference_images

ONE = "ipadapter/one.safetensors"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Use an empty folder, and small stand-ins to fill it with."""
    monkeypatch.setenv(standins.FOLDER_VARIABLE, str(tmp_path))

    def build():
        return standins.half(layouts.ip_adapter(layouts.linear_projection(8, 4), [6, 6], 4), 0)

    models = {
        ONE: Model(("few",), build, also=("ipadapter/same.safetensors",)),
        "ipadapter/two.safetensors": Model(("few",), build),
        "ipadapter/three.safetensors": Model(("other",), build),
    }
    monkeypatch.setattr(standins, "MODELS", models)


def digests(base):
    files = [path for path in base.rglob("*") if path.suffix in (".png", ".safetensors")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_only_what_is_missing_is_made_and_of_the_same_bytes_each_time(elsewhere, monkeypatch):
    first = digests(standins.ensure("few"))
    names = {"one.safetensors", "same.safetensors", "two.safetensors"}
    assert set(first) == {*names, *reference_images.SCENES}
    standins.path(ONE).write_bytes(b"kept")
    base = standins.ensure()
    assert standins.path(ONE).read_bytes() == b"kept"
    assert len(load_file(standins.path("ipadapter/three.safetensors"))) == 8
    assert not list(base.rglob("*.tmp"))
    monkeypatch.setattr(standins, "VERSION", standins.VERSION + 1)
    assert digests(standins.ensure("few")) == first


def test_an_unknown_name_is_refused_with_the_known_ones(elsewhere):
    with pytest.raises(KeyError, match=rf"no stand-in model or group 'sd9'.*few, other, {ONE}"):
        standins.ensure("sd9")


@pytest.fixture
def complete(models, caplog):
    """ComfyUI's loaders miss nothing in the files that they read within."""
    with caplog.at_level(logging.WARNING), torch.no_grad():
        yield
    assert not [r.getMessage() for r in caplog.records if "missing" in r.getMessage().lower()]


@pytest.mark.usefixtures("complete")
def test_the_host_loads_the_checkpoint_and_samples_pictures(host):
    import nodes

    name = "v1-5-pruned-emaonly-fp16.safetensors"
    model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(name)
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
@pytest.mark.usefixtures("complete")
def test_the_host_loads_an_image_encoder_that_tells_pictures_apart(host):
    import nodes

    encoder = nodes.CLIPVisionLoader().load_clip("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")[0]
    scenes = [np.asarray(reference_images.draw(f"reference{n}.png")) for n in ("", "_2")]
    images = torch.from_numpy(np.stack(scenes)).float() / 255
    embeds = encoder.encode_image(images)["image_embeds"]
    assert embeds.shape == (2, 768)
    assert torch.cosine_similarity(*embeds, dim=0) < 0.9


@pytest.mark.usefixtures("complete")
def test_the_host_loads_the_controlnet(host):
    import nodes

    name = "control_v11p_sd15_canny_fp16.safetensors"
    control = nodes.ControlNetLoader().load_controlnet(name)[0]
    assert len(control.control_model.zero_convs) == 2
