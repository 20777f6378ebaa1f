"""IPA_SavePrompt and IPA_LoadPrompt: to the bit, and never over another file."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core import prompt_file
from safetensors import safe_open

KINDS = ("image_embeds", "penultimate_hidden_states")
NAME = "image_prompts/prompt_00001_.safetensors"


def listed(load):
    return load.GET_NODE_INFO_V1()["input"]["required"]["prompt_name"][1]["options"]


def same(one, other):
    return all(
        torch.equal(getattr(getattr(one, side), kind), getattr(getattr(other, side), kind))
        for side in ("positive", "negative")
        for kind in KINDS
    )


def files(folder):
    return sorted(
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, names in os.walk(folder)
        for name in names
    )


def test_saved_and_loaded_to_the_bit(save, load, nodes, clip_vision):
    pictures = torch.rand(2, 40, 24, 3)
    (prompt,) = nodes["IPA_EncodeImage"].execute(clip_vision, pictures, "center").args
    made = save.execute(prompt, "image_prompts/prompt")
    assert made.args == (prompt,)
    entry = {"filename": "prompt_00001_.safetensors", "subfolder": "image_prompts"}
    assert made.ui == {"image_prompts": [entry | {"type": "output"}]}
    json.dumps(made.ui)
    assert listed(load) == [f"{NAME} [output]"]
    (found,) = load.execute(f"{NAME} [output]").args
    assert same(found, prompt)
    assert (found.encoder, found.fingerprint) == (prompt.encoder, prompt.fingerprint)
    assert len(prompt.fingerprint) == 64


def test_files_are_numbered_and_never_overwritten(save, small, prompts_folder):
    prefixes = ["image_prompts/prompt"] * 2 + ["image_prompts/other", "a/b/c", r"a\b\c", "top"]
    for prefix in prefixes:
        save.execute(small.images(), prefix)
    assert files(prompts_folder.parent) == [
        "a/b/c_00001_.safetensors",
        "a/b/c_00002_.safetensors",
        "image_prompts/other_00001_.safetensors",
        "image_prompts/prompt_00001_.safetensors",
        "image_prompts/prompt_00002_.safetensors",
        "top_00001_.safetensors",
    ]


def test_a_number_that_another_server_took_meanwhile_is_left_to_it(
    save, small, prompts_folder, monkeypatch
):
    import folder_paths

    taken = str(prompts_folder), "prompt", 1, "image_prompts", "image_prompts/prompt"
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *_: taken)
    given = [small.images(seed=seed) for seed in range(3)]
    for number, prompt in enumerate(given, 1):
        (entry,) = save.execute(prompt, "image_prompts/prompt").ui["image_prompts"]
        assert entry["filename"] == f"prompt_{number:05}_.safetensors"
    assert len(files(prompts_folder)) == 3
    for name, prompt in zip(files(prompts_folder), given, strict=True):
        assert same(prompt_file.load(prompts_folder / name), prompt)


def test_the_file_holds_the_workflow(save, small, prompts_folder, monkeypatch):
    from comfy_api.latest import io

    given = {io.Hidden.prompt: {"1": 2}, io.Hidden.extra_pnginfo: {"workflow": {"nodes": []}}}
    monkeypatch.setattr(save, "hidden", io.HiddenHolder.from_dict(given))
    save.execute(small.images(), "image_prompts/prompt")
    with safe_open(prompts_folder.parent / NAME, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["prompt"]) == {"1": 2}
    assert json.loads(metadata["workflow"]) == {"nodes": []}


def test_the_node_shows_where_it_saved(save, small, prompts_folder, monkeypatch):
    from comfy_api.latest import io

    shown = []
    there = SimpleNamespace(send_progress_text=lambda *given: shown.append(given))
    host = SimpleNamespace(PromptServer=SimpleNamespace(instance=there))
    monkeypatch.setitem(sys.modules, "server", host)
    monkeypatch.setattr(save, "hidden", io.HiddenHolder.from_dict({io.Hidden.unique_id: "7"}))
    save.execute(small.images(), "image_prompts/prompt")
    save.execute(small.images(), "other")
    assert shown == [(f"output/{NAME}", "7"), ("output/other_00001_.safetensors", "7")]
    there.send_progress_text = None
    monkeypatch.setattr(save, "hidden", None)  # as where no editor asks
    save.execute(small.images(), "image_prompts/prompt")


def test_a_name_over_a_link_is_looked_at_when_it_is_known(load, save):
    assert load.validate_inputs() is True and load.validate_inputs(prompt_name=None) is True
    assert save.validate_inputs() is True and save.validate_inputs(filename_prefix=None) is True
    assert load.fingerprint_inputs(prompt_name=None) == load.fingerprint_inputs() == ""


def test_the_fingerprint_follows_the_contents(load, file):
    path = file("output/image_prompts/a.safetensors", seed=1)
    name = "image_prompts/a.safetensors [output]"
    first = load.fingerprint_inputs(prompt_name=name)
    assert load.fingerprint_inputs(prompt_name=name) == first
    times = path.stat()
    file("output/image_prompts/a.safetensors", seed=2)  # of the same size, at the same time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert load.fingerprint_inputs(prompt_name=name) != first


def test_a_damaged_file_is_named(load, file):
    path = file("output/image_prompts/cut.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        load.execute("image_prompts/cut.safetensors [output]")


def test_a_loaded_prompt_of_another_encoder_is_refused_by_both_names(load, file, small):
    file("output/image_prompts/a.safetensors")
    (prompt,) = load.execute("image_prompts/a.safetensors [output]").args
    with pytest.raises(ValueError) as error:
        small.apply(small.model(), small.adapter(feature_dim=1024), prompt)
    for word in ("random.safetensors", "CLIP ViT-H/14", "a random encoder"):
        assert word in str(error.value)


def test_a_loaded_prompt_samples_the_same_bits(load, save, small):
    prompt = small.images(2)
    save.execute(prompt, "image_prompts/prompt")
    (loaded,) = load.execute(f"{NAME} [output]").args
    texts = small.text(1), small.text(2)
    given, found, none = (
        small.run(small.guider(model, *texts))
        for model in (
            *(small.apply(small.model(), small.adapter(), p) for p in (prompt, loaded)),
            small.model(),
        )
    )
    assert torch.equal(found, given)
    assert not torch.allclose(found, none, atol=1e-3)
