"""What the commands share that write files from the nodes' schemas."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.comfyui import install
from tools.comfyui.server import Client, Server

ObjectInfo = Mapping[str, Any]
"""What ComfyUI answers to `GET /object_info`: one entry a node class."""
Files = dict[Path, bytes]
PREFIX = "IPA_"  # of the ids of this pack's nodes


def ours(info: ObjectInfo) -> dict[str, Any]:
    """Return the nodes of this pack, in alphabetic order."""
    return {name: node for name, node in sorted(info.items()) if name.startswith(PREFIX)}


def served(info: ObjectInfo) -> dict[str, Any]:
    """Return the nodes of ComfyUI_IPAdapter_plus that this pack serves, in alphabetic order."""
    mark = "(A node of ComfyUI_IPAdapter_plus.)"
    return {name: x for name, x in sorted(info.items()) if str(x["description"]).endswith(mark)}


def inputs_of(node: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """Yield a node's inputs in order, as (name, type, options, optional)."""
    for kind in ("required", "optional"):
        for name, (type_, *rest) in node["input"].get(kind, {}).items():
            yield name, type_, rest[0] if rest else {}, kind == "optional"


def object_info(address: str | None) -> ObjectInfo:
    """Ask the ComfyUI at `address`, or one that is started for it, for its nodes' schemas."""
    if address:
        return Client(address).object_info()
    with tempfile.TemporaryDirectory() as name, Server(Path(name), install.require()) as client:
        return client.object_info()


def out_of_step(files: Files) -> list[str]:
    """Return the files, by their path in the repository, that do not hold what they should."""
    return [
        str(path.relative_to(install.ROOT))
        for path, content in files.items()
        if not path.is_file() or path.read_bytes() != content
    ]


def command(description: str, build: Callable[[ObjectInfo], Files]) -> None:
    """Write the files that `build` gives, or with `--check` end with 1 where one differs."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; tell what differs")
    parser.add_argument("--server", help="a running ComfyUI with this pack, as 127.0.0.1:8188")
    arguments = parser.parse_args()
    files = build(object_info(arguments.server))
    changed = out_of_step(files)
    if arguments.check and changed:
        sys.exit("\n".join(["Out of step; run this command without --check:", *changed]))
    for name in changed:
        path = install.ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])
        print(name)
