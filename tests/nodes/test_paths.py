"""The names of image prompts: inside the host's folders only, and which file each one means."""

from __future__ import annotations

import asyncio
import os

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core import prompt_file


def listed(load):
    return load.GET_NODE_INFO_V1()["input"]["required"]["prompt_name"][1]["options"]


def files(folder):
    return sorted(
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, names in os.walk(folder)
        for name in names
    )


def embeds(prompt):
    return prompt.positive.image_embeds


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


def test_a_registered_models_folder(load, file, folder, monkeypatch):
    import folder_paths

    known = str(folder.parent / "models" / "image_prompts")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "image_prompts", ([known], set()))
    file("models/image_prompts/deeper/mine.safetensors")
    file("models/secret.safetensors")
    (folder.parent / "models" / "image_prompts" / "notes.txt").touch()
    assert listed(load) == [os.path.join("deeper", "mine.safetensors")]
    assert len(load.execute("deeper/mine.safetensors").args[0].positive) == 2
    for name in ("../secret.safetensors", "/secret.safetensors", "deeper/../../secret.safetensors"):
        with pytest.raises(ValueError, match="no place inside"):
            load.execute(name)
    with pytest.raises(FileNotFoundError, match=known):
        load.execute("gone.safetensors")


def test_the_list_of_the_models_folder_goes_before_what_is_not_listed(
    load, file, folder, monkeypatch
):
    """Of one name: in the input folder it is not in the list, but can be typed."""
    import folder_paths

    known = str(folder.parent / "models" / "image_prompts")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "image_prompts", ([known], set()))
    for place in ("models/image_prompts", "input", "output"):
        file(f"{place}/a.safetensors", seed=len(place))
    assert listed(load) == ["a.safetensors"]
    for name, place in (
        ("a.safetensors", "models/image_prompts"),
        ("a.safetensors [input]", "input"),
        ("a.safetensors [output]", "output"),
    ):
        (found,) = load.execute(name).args
        expected = prompt_file.load(folder.parent / place / "a.safetensors")
        assert torch.equal(embeds(found), embeds(expected))
    (folder.parent / "models" / "image_prompts" / "a.safetensors").unlink()
    (found,) = load.execute("a.safetensors").args
    expected = prompt_file.load(folder.parent / "input" / "a.safetensors")
    assert torch.equal(embeds(found), embeds(expected))


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
@pytest.mark.parametrize("ask", ["execute", "fingerprint_inputs", "validate_inputs"])
def test_no_name_reads_outside_the_folders(load, file, tmp_path, name, ask):
    file("secret.safetensors")
    file("temp/secret.safetensors")
    name = name.replace("{folder}", str(tmp_path))
    if ask == "validate_inputs":
        said = load.validate_inputs(prompt_name=name)
        assert isinstance(said, str) and repr(name) in said
        return
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
def test_a_missing_file_names_the_folders_searched(load, prompts_folder, name):
    for ask in (load.execute, load.fingerprint_inputs):
        with pytest.raises(FileNotFoundError) as error:
            ask(prompt_name=name)
        folders = (
            str(prompts_folder.parents[1] / x / "image_prompts") for x in ("output", "input")
        )
        for word in (name, *folders, "(R)"):
            assert word in str(error.value)


def test_only_safetensors(load, file, prompts_folder):
    (prompts_folder / "a.bin").write_bytes(file("x.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not end in"):
        load.execute("image_prompts/a.bin [output]")


@pytest.mark.parametrize(
    "prefix",
    [
        "../prompt",
        "../../prompt",
        "image_prompts/../../prompt",
        "..",
        ".",
        "image_prompts/..",
        "",
        "  ",
        "image_prompts/",
        "..\\prompt",
        "image_prompts\\..\\..\\prompt",
        ".. /prompt",
        "/prompt",
        "\\prompt",
        "{folder}/prompt",
        "{folder}/output/../prompt",
        "C:prompt",
        "C:\\prompt",
        "\\\\server\\share\\prompt",
        "prompt:stream",
        "prompt\0",
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


@pytest.fixture
def validated(nodes, host, monkeypatch):
    """What the host says of a workflow for the server of one node of this pack."""
    import execution

    import nodes as hosts

    for name, node in nodes.items():
        monkeypatch.setitem(hosts.NODE_CLASS_MAPPINGS, name, node)

    def validated(class_type, **inputs):
        prompt = {"1": {"class_type": class_type, "inputs": inputs}}
        valid, errors, _ = asyncio.run(execution.validate_inputs("p", prompt, "1", {}))
        return valid, " ".join(error["details"] for error in errors)

    return validated


def test_the_host_refuses_names_before_it_runs_anything(validated, load, file, tmp_path):
    file("output/image_prompts/a.safetensors")
    file("secret.safetensors")
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
