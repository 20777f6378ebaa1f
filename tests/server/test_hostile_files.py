"""A models folder full of foreign and hostile files: no name and no content ends the server."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.server.test_bad_input import Hostile
from tools.comfyui.client import Client, PromptError
from tools.comfyui.server import Server

ADAPTER = "miniature.safetensors"
NAMES = [
    *(
        b"caf\xe9.safetensors",
        b"\xff\xfe.bin",
        b"shift\x82\xa0.pt",
        "ünïcode 狗 🐕.safetensors".encode(),
    ),
    *(b"new\nline.safetensors", b"tab\t.bin", b"quote'\".safetensors", b"percent%s%d{0}.bin"),
    *(b"-dash.safetensors", b"dots...safetensors", b" blank .bin", b"<b>html</b>.safetensors"),
    *(b"back\\slash.bin", b"colon:.pt", b"$HOME`id`.safetensors", b"\x1b[31mred.safetensors"),
    *("\u202eltr.safetensors".encode(), b"a" * 240 + b".bin", b".hidden.safetensors", b"x.SFT"),
]


def contents(tmp_path: Path) -> list[bytes]:
    """What foreign files begin with, and some that only look whole."""
    whole, pickled = tmp_path / "whole", tmp_path / "pickled"
    save_file({"a": torch.ones(3)}, whole)
    torch.save({"image_proj": Hostile(tmp_path / "ran")}, pickled)
    return [
        *(b"", b"\0", b"\xff" * 64, b"{", b"<html>", b"version https://git-lfs.github.com/spec/v1"),
        *(b"PK\x03\x04" + bytes(60), b"\x80\x02}q\0.", (2**63).to_bytes(8, "little") + b"{"),
        (16).to_bytes(8, "little") + b'{"a":{"dtype":"F',
        *(whole.read_bytes(), whole.read_bytes()[:-5], pickled.read_bytes(), pickle.dumps({1: 2})),
        *(b"GGUF\3\0\0\0", b"\x89PNG\r\n\x1a\n" + bytes(40), b"%PDF-1.7", os.urandom(4096)),
    ]


@pytest.fixture
def base(miniature_folder: Path, tmp_path: Path) -> Path:
    """The miniature's models, and a hundred files beside its adapter and its encoder."""
    folder = tmp_path / "base"
    for path in sorted(miniature_folder.rglob("*")):
        place = folder / path.relative_to(miniature_folder)
        if path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    some = contents(tmp_path)
    for kind in ("ipadapter", "clip_vision"):
        place = os.fsencode(folder / "models" / kind)
        for number, name in enumerate(NAMES):
            for again in range(3):
                path = os.path.join(place, b"%d" % again, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                Path(os.fsdecode(path)).write_bytes(some[(number + 7 * again) % len(some)])
        os.mkfifo(os.path.join(place, b"pipe.safetensors"))
        os.symlink(b"nowhere", os.path.join(place, b"dead link.safetensors"))
        os.symlink(b"loop.bin", os.path.join(place, b"loop.bin"))
        os.mkdir(os.path.join(place, b"folder.safetensors"))
    return folder


@pytest.fixture(scope="session")
def miniature_folder() -> Path:
    from miniature import assemble

    return assemble.ensure()


def shown(node: str, **inputs: str) -> dict[str, dict[str, object]]:
    """A prompt of one loader, whose output is shown."""
    preview = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    return {"1": {"class_type": node, "inputs": inputs}, "2": preview}


def ends_in_a_message(client: Client, prompt: dict[str, dict[str, object]]) -> bool:
    """Run it; returns whether it was refused, with words that can be printed."""
    try:
        client.run(prompt)
    except PromptError as error:
        assert str(error).encode("utf-8")
        return True
    return False


@pytest.mark.nightly
@pytest.mark.skipif(os.name == "nt", reason="names and kinds of files of POSIX systems")
def test_every_loader_in_a_folder_of_a_hundred_hostile_files(host_path, base, tmp_path):
    good = shown("IPA_LoadAdapter", adapter_name=ADAPTER)
    with Server(base, host_path, ("--cache-none",)) as client:
        for node, name in (
            ("IPA_LoadAdapter", "adapter_name"),
            ("IPA_LoadImageEncoder", "encoder_name"),
        ):
            listed = client.object_info(node)[node]["input"]["required"][name]
            names = listed[0] if isinstance(listed[0], list) else listed[1]["options"]
            assert len(names) > 40 and all(each.encode("utf-8") for each in names)
            unlisted = ["caf\udce9.safetensors", "../../main.py", "nowhere.bin"]
            taken = [
                each
                for each in (*names, *unlisted)
                if not ends_in_a_message(client, shown(node, **{name: each}))
            ]
            assert all("miniature" in each or "adapter" in each for each in taken), taken
            assert not ends_in_a_message(client, good)
        auto = shown("IPA_AutoLoad", model=["3", 0], preset="standard")
        auto["3"] = {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": "miniature.safetensors"},
        }
        assert not ends_in_a_message(client, auto)
        assert not ends_in_a_message(client, good)
    assert not (tmp_path / "ran").exists(), "code in a pickle ran"
