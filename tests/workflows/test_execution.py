"""What runs again after a change, what an interrupt leaves behind, and what a record is of."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from miniature.workflows import on_miniature
from tools.comfyui.client import PromptInterrupted
from tools.workflows.api import read

STEPS = 300  # more than any server takes before an interrupt reaches it
APPLY = ("IPA_Apply", "IPA_ApplyConditioning")


def id_of(api, *classes):
    return next(id_ for id_, node in api.items() if node["class_type"] in classes)


def node(class_, **inputs):
    return {"class_type": class_, "inputs": inputs}


def downstream(api, start):
    """Return the node and all that depend on it."""
    found = {start}
    while True:
        more = {
            id_
            for id_, node in api.items()
            for value in node["inputs"].values()
            if isinstance(value, list) and value[0] in found
        }
        if more <= found:
            return found
        found |= more


@pytest.fixture(scope="module", params=["image_only", "several_images_masks", "per_prompt"])
def api(request):
    """Of the module's scope, so that tests of one workflow follow each other."""
    return on_miniature(read(request.param), "a star", steps=2)


@pytest.mark.parametrize("knob, value", [("weight", 0.35), ("start_at", 0.6), ("end_at", 0.4)])
def test_a_changed_knob_runs_apply_and_what_follows(miniature_server, api, images, knob, value):
    before = miniature_server.run(api)
    changed = copy.deepcopy(api)
    apply = id_of(changed, *APPLY)
    changed[apply]["inputs"][knob] = value
    after = miniature_server.run(changed)
    assert set(after.executed) == downstream(api, apply)
    assert set(after.cached) == set(api) - downstream(api, apply)
    for reused in ("CheckpointLoaderSimple", "IPA_LoadAdapter", "IPA_EncodeImage"):
        assert id_of(api, reused) in after.cached
    (new,), (old,) = images(after), images(before)
    assert np.abs(new - old).max() > 5


def test_nothing_runs_again_without_a_change(miniature_server, api):
    miniature_server.run(api)
    again = miniature_server.run(api)
    assert again.executed == []
    assert set(again.cached) == set(api)


def test_an_interrupt_leaves_the_next_prompt_correct(miniature_server, api, images):
    before = miniature_server.run(api)
    sampler = id_of(api, "KSampler")
    long = copy.deepcopy(api)
    long[sampler]["inputs"]["steps"] = STEPS
    seen = []

    def stop(progress):
        if not seen:
            miniature_server.interrupt()
        seen.append(progress)

    with pytest.raises(PromptInterrupted):
        miniature_server.run(long, stop)
    assert {progress.node for progress in seen} == {sampler}
    assert 1 <= seen[-1].step < STEPS
    uncached = copy.deepcopy(api)  # a node that changes nothing has the sampler run anew
    inputs = uncached[sampler]["inputs"]
    uncached["repeat"] = node("RepeatLatentBatch", samples=inputs["latent_image"], amount=1)
    inputs["latent_image"] = ["repeat", 0]
    after = miniature_server.run(uncached)
    assert sampler in after.executed
    for image, expected in zip(images(after), images(before), strict=True):
        np.testing.assert_array_equal(image, expected)


SETTINGS = {"blocks": "all", "start_at": 0.0, "end_at": 1.0, "prompt_number": 0, "opacity": 0.6}


def mapped(api, name="map"):
    """Return the workflow with its sampler recorded, and the map saved instead of the image.

    The ids of the nodes for that begin with `name`.
    """
    sampler, decoder = (api[id_of(api, c)]["inputs"] for c in ("KSampler", "VAEDecode"))
    made = {
        f"{name} record": node("IPA_RecordAttention", model=sampler["model"]),
        f"{name} sampler": node("KSampler", **{**sampler, "model": [f"{name} record", 0]}),
        f"{name} decoder": node("VAEDecode", **{**decoder, "samples": [f"{name} sampler", 0]}),
        f"{name} heat": node(
            "IPA_AttentionMap",
            record=[f"{name} record", 1],
            samples=[f"{name} sampler", 0],
            image=[f"{name} decoder", 0],
            **SETTINGS,
        ),
        f"{name} picture": node("MaskToImage", mask=[f"{name} heat", 1]),
        f"{name} saved": node("SaveImage", images=[f"{name} picture", 0], filename_prefix=name),
    }
    dropped = {id_of(api, c) for c in ("KSampler", "VAEDecode", "SaveImage")}
    return {**{id_: n for id_, n in api.items() if id_ not in dropped}, **made}


@pytest.fixture
def two_latents():
    made = on_miniature(read("text_and_image"), "a star", steps=2)
    made[id_of(made, "EmptyLatentImage")]["inputs"]["batch_size"] = 2
    return made


def test_maps_of_a_list_of_latents(miniature_server, two_latents, images):
    """The host samples all of it before the first map: each gets that of its own run."""
    sampler = two_latents[id_of(two_latents, "KSampler")]["inputs"]
    both = sampler["latent_image"]

    def maps(class_, **inputs):
        two_latents["latents"] = node(class_, **inputs)
        sampler["latent_image"] = ["latents", 0]
        result = miniature_server.run(mapped(two_latents))
        result.images = {"": result.images["map saved"]}  # without the node's own preview
        return images(result)

    found = maps("RebatchLatents", latents=both, batch_size=1)
    for number, one in enumerate(found):
        (alone,) = maps("LatentFromBatch", samples=both, batch_index=number, length=1)
        assert np.abs(one - alone).max() <= 1
    assert np.abs(found[0] - found[1]).max() > 2


def test_two_records_of_one_model(miniature_server, two_latents):
    """Equal inputs, and yet a record of its own each: the host does not take one for both."""
    both = {**mapped(two_latents, "one"), **mapped(two_latents, "other")}
    assert {"one record", "other record"} <= set(miniature_server.run(both).executed)
