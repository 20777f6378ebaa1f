"""IPA_SavePrompt and IPA_LoadPrompt: to the bit, never over another file, and inside the host's
folders only."""

from __future__ import annotations

import asyncio
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
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


@pytest.fixture
def models_folder(folder, monkeypatch):
    """A registered models folder of image prompts; its path as text."""
    import folder_paths

    known = str(folder.parent / "models" / "image_prompts")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "image_prompts", ([known], set()))
    return known


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


def test_the_node_shows_where_it_saved(save, small, monkeypatch):
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


def test_the_list_is_of_both_folders_and_changes_with_them(load, file, prompts_folder):
    assert listed(load) == []
    file("output/image_prompts/a.safetensors")
    file("input/image_prompts/deeper/b.safetensors")
    file("output/elsewhere/c.safetensors")
    (prompts_folder / "notes.txt").touch()
    (prompts_folder / "d.safetensors.tmp").touch()
    expected = ["image_prompts/a.safetensors [output]", "image_prompts/deeper/b.safetensors"]
    assert listed(load) == expected
    for name in (*expected, "image_prompts/deeper/b.safetensors [input]"):
        assert len(load.execute(name).args[0].positive) == 2
    (prompts_folder / "a.safetensors").unlink()
    assert listed(load) == expected[1:]


def test_a_registered_models_folder(load, file, folder, models_folder):
    file("models/image_prompts/deeper/mine.safetensors")
    file("models/secret.safetensors")
    (folder.parent / "models" / "image_prompts" / "notes.txt").touch()
    assert listed(load) == [os.path.join("deeper", "mine.safetensors")]
    assert len(load.execute("deeper/mine.safetensors").args[0].positive) == 2
    for name in ("../secret.safetensors", "/secret.safetensors", "deeper/../../secret.safetensors"):
        with pytest.raises(ValueError, match="no place inside"):
            load.execute(name)
    with pytest.raises(FileNotFoundError, match=models_folder):
        load.execute("gone.safetensors")


def test_the_list_of_the_models_folder_goes_before_what_is_not_listed(load, file, models_folder):
    """Of one name: in the input folder it is not in the list, but can be typed."""
    paths = {
        place: file(f"{place}/a.safetensors", seed=len(place))
        for place in ("models/image_prompts", "input", "output")
    }
    assert listed(load) == ["a.safetensors"]
    for name, place in (
        ("a.safetensors", "models/image_prompts"),
        ("a.safetensors [input]", "input"),
        ("a.safetensors [output]", "output"),
    ):
        assert same(load.execute(name).args[0], prompt_file.load(paths[place]))
    paths["models/image_prompts"].unlink()
    assert same(load.execute("a.safetensors").args[0], prompt_file.load(paths["input"]))


def test_others_of_the_same_folders_may_be_named(load, file):
    """What was saved under another prefix is not listed, but a workflow can ask for it."""
    file("output/portraits/anna.safetensors", seed=3)
    assert listed(load) == []
    name = "portraits/anna.safetensors [output]"
    assert load.validate_inputs(prompt_name=name) is True
    assert len(load.execute(name).args[0].positive) == 2


OUTSIDE = [
    "../secret.safetensors",
    "../secret.safetensors [output]",
    "../../secret.safetensors [input]",
    "image_prompts/../../secret.safetensors [output]",
    "image_prompts/../../secret.safetensors",
    "image_prompts/./../../secret.safetensors [output]",
    "..\\secret.safetensors",
    "image_prompts\\..\\..\\secret.safetensors [output]",
    "..\\/secret.safetensors",
    ".. /secret.safetensors",
    "{folder}/secret.safetensors",
    "{folder}/secret.safetensors [output]",
    "/{folder}/secret.safetensors [input]",
    "C:secret.safetensors",
    "C:\\secret.safetensors",
    "\\\\server\\share\\secret.safetensors",
    "file:///{folder}/secret.safetensors",
    "secret.safetensors\0 [output]",
    "./secret.safetensors",
    "../temp/secret.safetensors",
    "secret.safetensors [temp]",
    "",
    " [output]",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("ask", ["execute", "fingerprint_inputs"])
def test_no_name_reads_outside_the_folders(load, file, tmp_path, name, ask):
    file("secret.safetensors")
    file("temp/secret.safetensors")
    name = name.replace("{folder}", str(tmp_path))
    with pytest.raises(ValueError) as error:
        getattr(load, ask)(prompt_name=name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", [5, ["a"], {"a": 1}, True, b"a"])
def test_what_is_no_name(load, name):
    assert f"Found {name!r}" in load.validate_inputs(prompt_name=name)


def test_a_link_that_leads_out_of_the_folder(load, save, small, file, prompts_folder, tmp_path):
    file("elsewhere/secret.safetensors")
    try:
        (prompts_folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert listed(load) == []
    with pytest.raises(FileNotFoundError):
        load.execute("image_prompts/link/secret.safetensors [output]")
    with pytest.raises(ValueError, match="leads out of the output folder"):
        save.execute(small.images(), "image_prompts/link/prompt")
    assert files(tmp_path / "elsewhere") == ["secret.safetensors"]


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.safetensors [output]"])
def test_a_missing_file_names_the_folders_searched(load, tmp_path, name):
    folders = (str(tmp_path / place / "image_prompts") for place in ("output", "input"))
    words = name, *folders, "(R)"
    for ask in (load.execute, load.fingerprint_inputs):
        with pytest.raises(FileNotFoundError) as error:
            ask(prompt_name=name)
        assert all(word in str(error.value) for word in words)


def test_only_safetensors(load, file, prompts_folder):
    (prompts_folder / "a.bin").write_bytes(file("x.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not end in"):
        load.execute("image_prompts/a.bin [output]")


@pytest.mark.parametrize(
    "prefix",
    [
        *("../prompt", "../../prompt", "image_prompts/../../prompt", "..", ".", "image_prompts/.."),
        *("", "  ", "image_prompts/", "..\\prompt", "image_prompts\\..\\..\\prompt", ".. /prompt"),
        *("/prompt", "\\prompt", "{folder}/prompt", "{folder}/output/../prompt"),
        *("C:prompt", "C:\\prompt", "\\\\server\\share\\prompt", "prompt:stream", "prompt\0"),
    ],
)
def test_no_prefix_writes_outside_the_output_folder(save, small, tmp_path, prefix):
    prefix = prefix.replace("{folder}", str(tmp_path))
    before = files(tmp_path)
    assert repr(prefix) in save.validate_inputs(filename_prefix=prefix)
    with pytest.raises(ValueError) as error:
        save.execute(small.images(), prefix)
    assert repr(prefix) in str(error.value)
    assert files(tmp_path) == before


def test_prefixes_for_which_there_is_no_folder(save, small, prompts_folder):
    (prompts_folder / "a.png").touch()
    with pytest.raises(ValueError, match=r"image_prompts/a\.png/prompt.*cannot be made"):
        save.execute(small.images(), "image_prompts/a.png/prompt")
    with pytest.raises(ValueError, match="cannot be written"):
        save.execute(small.images(), "image_prompts/" + 300 * "n")


def test_the_host_refuses_names_before_it_runs_anything(nodes, monkeypatch, load, file, tmp_path):
    import execution

    import nodes as hosts

    for node in ("IPA_LoadPrompt", "IPA_SavePrompt"):
        monkeypatch.setitem(hosts.NODE_CLASS_MAPPINGS, node, nodes[node])

    def validated(class_type, **inputs):
        prompt = {"1": {"class_type": class_type, "inputs": inputs}}
        valid, errors, _ = asyncio.run(execution.validate_inputs("p", prompt, "1", {}))
        return valid, " ".join(error["details"] for error in errors)

    file("output/image_prompts/a.safetensors")
    file("secret.safetensors")
    file("temp/secret.safetensors")
    good = "image_prompts/a.safetensors [output]"
    assert validated("IPA_LoadPrompt", prompt_name=good) == (True, "")
    for name in OUTSIDE:
        name = name.replace("{folder}", str(tmp_path))
        valid, said = validated("IPA_LoadPrompt", prompt_name=name)
        assert not valid and repr(name) in said
    for name in (5, {"__value__": ["a"]}, {"a": 1}):
        assert not validated("IPA_LoadPrompt", prompt_name=name)[0]
    valid, said = validated("IPA_SavePrompt", filename_prefix="../prompt")
    assert not valid and "'../prompt' is no place inside" in said
