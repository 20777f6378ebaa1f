"""Image prompts that are calculated, kept and fetched by workflows for the server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tools.comfyui.client import Client, PromptError, Result


@pytest.fixture
def place(models: Path) -> Iterator[Path]:
    """For a prompt in the input folder, of a new name; removed after the test."""
    path = models / "input" / "image_prompts" / f"{uuid.uuid4().hex}.safetensors"
    path.parent.mkdir(exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def kept(client: Client, result: Result, node_id: str, kind: str) -> bytes:
    (entry,) = result.outputs[node_id][kind]
    return client.view(entry)


def latent(client: Client, result: Result) -> torch.Tensor:
    return load(kept(client, result, "SaveLatent", "latents"))["latent_tensor"]


def loading(made: Any, path: Path) -> Any:
    """Put a saved prompt in the place of the workflow's images and their encoder."""
    prompt = made.add("IPA_LoadPrompt", prompt_name=f"image_prompts/{path.name}")
    made.set("IPA_Apply", image_prompt=prompt)
    for class_type in ("IPA_EncodeImage", "CLIPVisionLoader", "LoadImage"):
        del made[made.of(class_type)]
    return made


def test_a_file_is_read_again_when_it_was_changed(
    server: Client, graph: Callable[..., Any], place: Path
) -> None:
    saving = graph().set("KSampler", seed=902)
    encoded = [saving.of("IPA_EncodeImage"), 0]
    saving.add("IPA_SavePrompt", image_prompt=encoded, filename_prefix="image_prompts/changed")
    first = server.run(saving)
    place.write_bytes(kept(server, first, "IPA_SavePrompt", "image_prompts"))
    made = loading(graph().set("KSampler", seed=902), place)
    before = server.run(made)
    assert torch.equal(latent(server, before), latent(server, first))
    assert server.run(made).executed == []
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(PromptError, match=f"{place.name}.*cut short") as refused:
        server.run(made)
    assert refused.value.node_class == "IPA_LoadPrompt"


def test_all_nodes_in_one_workflow(server: Client, graph: Callable[..., Any]) -> None:
    made = graph().set("KSampler", seed=903)
    encode = made.of("IPA_EncodeImage")
    clip, image = (made[encode]["inputs"][name] for name in ("clip_vision", "image"))
    square = made.add(
        "IPA_PrepareImage", clip_vision=clip, image=image, crop="point", x=0.2, y=0.8, grid=1
    )
    noise = made.add(
        "IPA_NegativeNoise", image=square, kind="shuffle", strength=1.0, blur=2.0, seed=3
    )
    made.set("IPA_EncodeImage", image=square, negative_image=noise)
    made["other"] = {"class_type": "IPA_EncodeImage", "inputs": dict(made[encode]["inputs"])}
    made["other"]["inputs"] |= {"image": image, "crop": "none"}
    sockets = {"prompts.prompt0": [encode, 0], "prompts.prompt1": ["other", 0]}
    both = made.add("IPA_CombinePrompts", **sockets, method="average", weights="1, 3")
    made.set("IPA_Apply", image_prompt=both)
    for name, link in (("one", [encode, 0]), ("two", ["other", 0]), ("both", both)):
        prefix = f"image_prompts/{name}"
        inputs = {"image_prompt": link, "filename_prefix": prefix}
        made[name] = {"class_type": "IPA_SavePrompt", "inputs": inputs}
    result = server.run(made)
    assert len(result.images["IPA_PrepareImage"]) == 1
    one, two, found = (
        load(kept(server, result, name, "image_prompts")) for name in ("one", "two", "both")
    )
    for key, value in found.items():
        truth = (one[key].double() + 3 * two[key].double()) / 4
        assert torch.equal(value, truth.float()), key
    assert latent(server, result).isfinite().all()
