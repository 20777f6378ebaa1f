"""IPA_LoadImageEncoder: which files it offers, and when one is read again."""

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
    return nodes["IPA_LoadImageEncoder"]


def write(path, seed=0):
    model = small_models.open_clip_model()
    state = {key: (x + seed).contiguous() for key, x in model.state_dict().items()}
    save_file(state, path)
    path.with_suffix(".json").write_text(json.dumps(small_models.open_clip_config()))


def test_it_offers_the_hosts_image_encoders_and_loads_one(load, encoders):
    write(encoders / NAME)
    options = load.GET_NODE_INFO_V1()["input"]["required"]["encoder_name"][1]["options"]
    assert options == [NAME]
    (encoder,) = load.execute(NAME).args
    assert (encoder.image_size, encoder.model_type) == (small_models.SIDE, "clip_vision_model")


@pytest.mark.parametrize("which", [NAME, "small.json", "open_clip_config.json"])
def test_the_fingerprint_follows_the_file_and_its_configuration(load, encoders, which):
    write(encoders / NAME)
    (encoders / "open_clip_config.json").write_text("{}")
    first = load.fingerprint_inputs(encoder_name=NAME)
    assert load.fingerprint_inputs(encoder_name=NAME) == first
    status = (encoders / which).stat()
    os.utime(encoders / which, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    assert load.fingerprint_inputs(encoder_name=NAME) != first


def test_the_fingerprint_tells_no_folder(load, encoders):
    """The host writes it into every picture that is saved."""
    write(encoders / NAME)
    assert isinstance(told := load.fingerprint_inputs(encoder_name=NAME), str)
    assert not any(part in told for part in ("/", os.sep, "small"))


def test_the_fingerprint_of_a_name_over_a_link(load, encoders):
    """The host gives None for it; whatever it raised would have the node run each time."""
    assert load.fingerprint_inputs(encoder_name=None) is None


def test_a_file_of_torch_before_1_6(load, encoders):
    """Which the search of IPA_AutoLoad leaves to this node."""
    write(encoders / NAME)
    state = small_models.open_clip_model().state_dict()
    torch.save(state, encoders / "small.pt", _use_new_zipfile_serialization=False)
    (old,), (new,) = load.execute("small.pt").args, load.execute(NAME).args
    for key, weight in new.model.state_dict().items():
        assert torch.equal(old.model.state_dict()[key], weight)


@pytest.mark.parametrize("layers, width", [(31, 1408), (22, 768)])
def test_a_size_of_transformers_that_the_host_does_not_know(load, encoders, layers, width):
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
        load.execute(NAME)


def test_short_memory_is_not_taken_for_an_unknown_size(load, encoders, monkeypatch):
    import comfy.clip_vision

    def fail(path):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    save_file({"vision_model.embeddings.class_embedding": torch.ones(8)}, encoders / NAME)
    monkeypatch.setattr(comfy.clip_vision, "load", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        load.execute(NAME)


@pytest.mark.parametrize("text", ['{"a": 1}', "{}"])
def test_a_folders_configuration_of_something_else(load, encoders, text):
    write(encoders / NAME)
    (encoders / "open_clip_config.json").write_text(text)
    assert load.execute(NAME).args[0].image_size == small_models.SIDE


def test_a_missing_file_names_the_folders_searched(load, encoders):
    for ask in (load.execute, load.fingerprint_inputs):
        with pytest.raises(FileNotFoundError, match=f"'gone.pt'.*{encoders}.*refresh"):
            ask(encoder_name="gone.pt")
    with pytest.raises(FileNotFoundError):
        load.execute(encoder_name="../small.safetensors")
