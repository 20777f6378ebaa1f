"""What runs again after a change, and what an interrupt leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from miniature.workflows import on_miniature
from tools.comfyui.client import Progress, PromptInterrupted

STEPS = 300  # more than any server takes before an interrupt reaches it
APPLY = ("IPA_Apply", "IPA_ApplyConditioning")


def first_apply(api: dict[str, Any]) -> str:
    return next(id_ for id_, node in api.items() if node["class_type"] in APPLY)


def downstream(api: dict[str, Any], start: str) -> set[str]:
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


def of_class(api: dict[str, Any], class_: str) -> str:
    return next(id_ for id_, node in api.items() if node["class_type"] == class_)


def uncached(api: dict[str, Any]) -> dict[str, Any]:
    """Put a node before the sampler that changes nothing, so that it samples anew."""
    made = copy.deepcopy(api)
    inputs = made[of_class(made, "KSampler")]["inputs"]
    repeat = {"samples": inputs["latent_image"], "amount": 1}
    made["repeat"] = {"class_type": "RepeatLatentBatch", "inputs": repeat}
    inputs["latent_image"] = ["repeat", 0]
    return made


@pytest.fixture(scope="module", params=["image_only", "several_images_masks", "per_prompt"])
def api(request, reading) -> dict[str, Any]:
    """Of the module's scope, so that tests of one workflow follow each other."""
    return on_miniature(reading(request.param).api, "a star", steps=2)


@pytest.mark.parametrize("knob, value", [("weight", 0.35), ("start_at", 0.6), ("end_at", 0.4)])
def test_a_changed_knob_runs_apply_and_what_follows(miniature_server, api, images, knob, value):
    before = miniature_server.run(api)
    changed = copy.deepcopy(api)
    apply = first_apply(changed)
    changed[apply]["inputs"][knob] = value
    after = miniature_server.run(changed)
    assert set(after.executed) == downstream(api, apply)
    assert set(after.cached) == set(api) - downstream(api, apply)
    for reused in ("CheckpointLoaderSimple", "IPA_LoadAdapter", "IPA_EncodeImage"):
        assert of_class(api, reused) in after.cached
    (new,), (old,) = images(after), images(before)
    assert np.abs(new - old).max() > 5


def test_nothing_runs_again_without_a_change(miniature_server, api):
    miniature_server.run(api)
    again = miniature_server.run(api)
    assert again.executed == []
    assert set(again.cached) == set(api)


def test_an_interrupt_leaves_the_next_prompt_correct(miniature_server, api, images):
    before = miniature_server.run(api)
    sampler = of_class(api, "KSampler")
    long = copy.deepcopy(api)
    long[sampler]["inputs"]["steps"] = STEPS
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        if not seen:
            miniature_server.interrupt()
        seen.append(progress)

    with pytest.raises(PromptInterrupted):
        miniature_server.run(long, stop)
    assert {progress.node for progress in seen} == {sampler}
    assert 1 <= seen[-1].step < STEPS
    after = miniature_server.run(uncached(api))
    assert sampler in after.executed
    for image, expected in zip(images(after), images(before), strict=True):
        np.testing.assert_array_equal(image, expected)
