"""Recording attention through the host's executor: which sampling run a map is of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miniature.workflows import on_miniature

SETTINGS = {"blocks": "all", "start_at": 0.0, "end_at": 1.0, "prompt_number": 0, "opacity": 0.6}


def of_class(api: dict[str, Any], class_: str) -> str:
    return next(id_ for id_, node in api.items() if node["class_type"] == class_)


def node(class_: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_, "inputs": inputs}


def mapped(api: dict[str, Any], name: str = "map") -> dict[str, Any]:
    """Return the workflow with its sampler recorded, and the map saved instead of the image.

    The ids of the nodes for that begin with `name`.
    """
    sampler, decoder = (api[of_class(api, c)]["inputs"] for c in ("KSampler", "VAEDecode"))
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
    dropped = {of_class(api, c) for c in ("KSampler", "VAEDecode", "SaveImage")}
    return {**{id_: n for id_, n in api.items() if id_ not in dropped}, **made}


@pytest.fixture
def api(reading) -> dict[str, Any]:
    """Of two latents."""
    made = on_miniature(reading("text_and_image").api, "a star", steps=2)
    made[of_class(made, "EmptyLatentImage")]["inputs"]["batch_size"] = 2
    return made


def test_a_list_of_latents(miniature_server, api, images):
    """The host samples all of it before the first map: each gets that of its own run."""
    sampler = api[of_class(api, "KSampler")]["inputs"]
    both = sampler["latent_image"]

    def maps(class_, **inputs):
        api["latents"] = node(class_, **inputs)
        sampler["latent_image"] = ["latents", 0]
        result = miniature_server.run(mapped(api))
        result.images = {"": result.images["map saved"]}  # without the node's own preview
        return images(result)

    found = maps("RebatchLatents", latents=both, batch_size=1)
    for number, one in enumerate(found):
        (alone,) = maps("LatentFromBatch", samples=both, batch_index=number, length=1)
        assert np.abs(one - alone).max() <= 1
    assert np.abs(found[0] - found[1]).max() > 2


def test_two_records_of_one_model(miniature_server, api):
    """Equal inputs, and yet a record of its own each: the host does not take one for both."""
    both = {**mapped(api, "one"), **mapped(api, "other")}
    assert {"one record", "other record"} <= set(miniature_server.run(both).executed)
