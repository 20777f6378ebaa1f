"""IPA_AutoLoad in a running server: it loads once, and looks again when a file comes."""

from __future__ import annotations

import shutil

import pytest

NAME = "zz-came-later.safetensors"


@pytest.fixture
def later(models):
    """Where an adapter may come to lie; gone after the test."""
    path = models / "models" / "ipadapter" / NAME
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def auto(graph):
    """Return the workflow with one node in place of both loaders."""

    def auto(**inputs):
        made = graph()
        made.add("IPA_AutoLoad", model=[made.of("CheckpointLoaderSimple"), 0], **inputs)
        made.set("IPA_Apply", adapter=["IPA_AutoLoad", 0])
        made.set("IPA_EncodeImage", clip_vision=["IPA_AutoLoad", 1])
        for loader in ("IPA_LoadAdapter", "CLIPVisionLoader"):
            del made[made.of(loader)]
        made.add("PreviewAny", source=["IPA_AutoLoad", 2])
        return made

    return auto


def test_it_loads_once_and_again_when_a_file_comes(server, auto, models, later):
    graph = auto(preset="standard")
    server.run(graph)
    assert "IPA_AutoLoad" in server.run(graph).cached
    changed = auto(preset="standard").set("IPA_Apply", weight=0.3)
    assert "IPA_AutoLoad" in server.run(changed).cached
    shutil.copyfile(later.with_name("ip-adapter-plus_sd15.safetensors"), later)
    assert "IPA_AutoLoad" in server.run(changed).cached  # of no use for this preset
    shutil.copyfile(later.with_name("ip-adapter_sd15.safetensors"), later)
    assert "IPA_AutoLoad" in server.run(changed).executed


def test_another_preset_runs_on_the_hidden_states(server, auto):
    assert "IPA_AutoLoad" in server.run(auto(preset="fine-grained")).executed
