"""Other packs, from checkouts in a folder: `nox -s packs -- FOLDER`."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch

FOLDER = "IP_ADAPTER_PACKS"
_nodes: dict[str, dict[str, Any]] = {}


def found(name: str) -> Path:
    """Return the folder of a pack's checkout; skips without it."""
    folder = os.environ.get(FOLDER)
    if not folder:
        pytest.skip(f"{FOLDER} names no folder of checkouts")
    path = Path(folder, name)
    if not (path / "__init__.py").is_file():
        pytest.skip(f"no checkout of {name} in {folder}")
    return path


def nodes_of(name: str) -> dict[str, Any]:
    """Load a pack as the host does, and return its node classes by id; skips if it needs more."""
    path = found(name)
    if name not in _nodes:
        module_name = f"custom_nodes.{name}"
        given = {"submodule_search_locations": [str(path)]}
        spec = importlib.util.spec_from_file_location(module_name, path / "__init__.py", **given)
        assert spec is not None and spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        # prompt-control loads nothing where it sees pytest.
        seen = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        try:
            with patch.dict(os.environ, seen, clear=True):
                spec.loader.exec_module(module)
            nodes = dict(getattr(module, "NODE_CLASS_MAPPINGS", {}))
            if hasattr(module, "comfy_entrypoint"):
                nodes |= asyncio.run(_of_extension(module))
        except ModuleNotFoundError as error:
            del sys.modules[module_name]
            pytest.skip(f"{name} does not load here: {error}")
        _nodes[name] = nodes
    return _nodes[name]


async def _of_extension(module: Any) -> dict[str, Any]:
    made = module.comfy_entrypoint()
    extension = await made if asyncio.iscoroutine(made) else made
    return {node.GET_SCHEMA().node_id: node for node in await extension.get_node_list()}


def run_node(node: Any, inputs: dict[str, Any]) -> Any:
    """Run a node of either kind, inputs at their defaults unless given; returns its outputs."""
    given = {}
    for name, (kind, *rest) in node.INPUT_TYPES().get("required", {}).items():
        options = rest[0] if rest else {}
        if name not in inputs and ("default" in options or isinstance(kind, list | tuple)):
            given[name] = options.get("default", kind[0] if isinstance(kind, list | tuple) else 0)
        elif name not in inputs and "options" in options:
            given[name] = options["options"][0]
    if hasattr(node, "execute") and not hasattr(node, "FUNCTION"):
        out = node.execute(**given, **inputs)
    else:
        out = getattr(node(), getattr(node, "FUNCTION", "execute"))(**given, **inputs)
    return getattr(out, "args", None) or getattr(out, "result", None) or out


@pytest.fixture(scope="session")
def client(models_sdxl, server):
    """A server on stand-ins of both families, for the editor."""
    return server


@pytest.fixture(scope="session")
def truth(pack):
    from tests.sampling import truth

    return truth


@pytest.fixture(autouse=True)
def _as_in_the_host():
    with torch.inference_mode():
        yield


@pytest.fixture
def use(pack, monkeypatch) -> Callable[..., Any]:
    """`use("pack", "node", input=…)`: the first output of a node of another pack."""
    import server

    if getattr(server.PromptServer, "instance", None) is None:
        # Packs add routes to the server when they are imported.
        monkeypatch.setattr(server.PromptServer, "instance", MagicMock(), raising=False)

    def use(name: str, node: str, **inputs: Any) -> Any:
        return run_node(nodes_of(name)[node], inputs)[0]

    return use


def commit(name: str) -> SimpleNamespace:
    """Return hash and date of a pack's checkout."""
    show = ["git", "-C", str(found(name)), "log", "-1", "--format=%h %as"]
    text = subprocess.run(show, capture_output=True, text=True, check=False).stdout
    hash_, _, date = text.strip().partition(" ")
    return SimpleNamespace(hash=hash_ or "unknown", date=date)
