"""The workflows' files, read once, and what their tests run them on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import standins
from tools.comfyui.server import Client, Result
from tools.workflows import api
from tools.workflows.api import FOLDER, NAMES


@dataclass(frozen=True)
class Workflow:
    """One task in both formats."""

    name: str
    editor: dict[str, Any]
    api: dict[str, Any]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """The editor's nodes that do something: all but the notes."""
        return [node for node in self.editor["nodes"] if node["type"] != "MarkdownNote"]

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [node for node in self.editor["nodes"] if node["type"] == "MarkdownNote"]


def read(name: str) -> Workflow:
    """Read the files of one task. Raises FileNotFoundError if either format is missing."""
    editor = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return Workflow(name, editor, api.read(name))


@pytest.fixture(scope="session")
def workflows() -> list[Workflow]:
    """Every workflow, for tests that tell at once of all that fail."""
    return [read(name) for name in NAMES]


@pytest.fixture(params=NAMES)
def workflow(request: pytest.FixtureRequest) -> Workflow:
    return read(request.param)


@pytest.fixture(scope="session")
def reading() -> Callable[[str], Workflow]:
    """Return what reads a workflow by name, for tests of particular ones."""
    return read


@pytest.fixture(scope="session")
def client(server: Client) -> Client:
    """Return the server on stand-ins, with every file and saved prompt that a workflow names."""
    standins.ensure()
    server.run(needed(api.read("save_prompt"), "IPA_SavePrompt"))
    return server


def needed(api: dict[str, Any], class_: str) -> dict[str, Any]:
    """Return the node of that class, and all that it needs."""
    found = [id_ for id_, node in api.items() if node["class_type"] == class_]
    for id_ in found:
        found += [value[0] for value in api[id_]["inputs"].values() if isinstance(value, list)]
    return {id_: api[id_] for id_ in found}


@pytest.fixture(scope="session")
def object_info(client: Client) -> dict[str, Any]:
    """Return the host's node classes."""
    return client.object_info()


@pytest.fixture(scope="session")
def images() -> Callable[[Result], list[np.ndarray]]:
    """Return what decodes a run's images, [height, width, 3]: their files hold the prompt too."""

    def decode(result: Result) -> list[np.ndarray]:
        files = (data for node in result.images.values() for data in node)
        return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float) for data in files]

    return decode
