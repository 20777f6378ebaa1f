"""Image prompts that are calculated, kept and fetched by workflows for the server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from tools.comfyui.client import Client, PromptError, Result
from tools.comfyui.server import Server

GIVEN = ("IPA_EncodeImage", "CLIPVisionLoader", "LoadImage")  # not needed by a saved prompt


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


def saving(made: Any, prefix: str) -> Any:
    """Let the workflow save its prompt too."""
    made.add("IPA_SavePrompt", image_prompt=[made.of("IPA_EncodeImage"), 0], filename_prefix=prefix)
    return made


def loading(made: Any, name: str) -> Any:
    """Put a saved prompt in the place of the workflow's images and their encoder."""
    made.set("IPA_Apply", image_prompt=made.add("IPA_LoadPrompt", prompt_name=name))
    for class_type in GIVEN:
        del made[made.of(class_type)]
    return made


@pytest.mark.nightly
def test_a_saved_prompt_samples_the_same_latents_in_a_new_process(
    server: Client, graph: Callable[..., Any], place: Path, models: Path, host_path: Path
) -> None:
    first = server.run(saving(graph().set("KSampler", seed=901), "image_prompts/kept"))
    expected = latent(server, first)
    place.write_bytes(kept(server, first, "IPA_SavePrompt", "image_prompts"))
    without = server.run(graph().set("KSampler", seed=901).set("IPA_Apply", weight=0.0))
    assert not torch.allclose(latent(server, without), expected, atol=1e-2)

    name = f"image_prompts/{place.name}"
    with Server(models, host_path, ("--cache-classic",)) as other:
        info = other.object_info("IPA_LoadPrompt")["IPA_LoadPrompt"]
        assert name in info["input"]["required"]["prompt_name"][1]["options"]
        again = other.run(loading(graph().set("KSampler", seed=901), name))
        assert "IPA_EncodeImage" not in again.executed
        assert torch.equal(latent(other, again), expected)


def test_a_file_is_read_again_when_it_was_changed(
    server: Client, graph: Callable[..., Any], place: Path
) -> None:
    first = server.run(saving(graph().set("KSampler", seed=902), "image_prompts/changed"))
    place.write_bytes(kept(server, first, "IPA_SavePrompt", "image_prompts"))
    made = loading(graph().set("KSampler", seed=902), f"image_prompts/{place.name}")
    before = server.run(made)
    assert torch.equal(latent(server, before), latent(server, first))
    assert server.run(made).executed == []
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(PromptError, match=f"{place.name}.*cut short") as refused:
        server.run(made)
    assert refused.value.node_class == "IPA_LoadPrompt"


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "..\\x.safetensors"])
def test_names_that_lead_elsewhere_are_refused_before_anything_runs(
    server: Client, graph: Callable[..., Any], name: str
) -> None:
    # Alone: where another output is sound the host runs that one, and reports this one beside it.
    saved = saving(graph(), name)
    del saved["SaveLatent"]
    for made, class_type in ((loading(graph(), name), "IPA_LoadPrompt"), (saved, "IPA_SavePrompt")):
        with pytest.raises(PromptError, match="no place inside ComfyUI's folders") as refused:
            server.run(made)
        assert refused.value.node_class == class_type
        assert refused.value.exception_type == "custom_validation_failed"


def test_all_nodes_in_one_workflow(
    server: Client, graph: Callable[..., Any], place: Path, models: Path
) -> None:
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
    # A prompt of another encoder: half as wide.
    place.write_bytes(kept(server, result, "both", "image_prompts"))
    narrow(place)
    with pytest.raises(PromptError, match=r"ip-adapter_sd15\.safetensors.*an image encoder of"):
        server.run(loading(graph(), f"image_prompts/{place.name}"))


def narrow(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = {key: x[..., ::2].contiguous() for key, x in load_file(path).items()}
    save_file(state, path, metadata)
