"""The workflows' files, and what their tests run them on."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any
from urllib import request

import numpy as np
import pytest
from PIL import Image

from tests.support import standins
from tools.workflows.api import FOLDER, NAMES, needed, read


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
    def models(self) -> list[dict[str, str]]:
        """The downloads that its nodes offer."""
        return [m for node in self.nodes for m in node["properties"].get("models", ())]


@pytest.fixture(params=NAMES)
def workflow(request):
    editor = json.loads((FOLDER / f"{request.param}.json").read_text("utf-8"))
    return Workflow(request.param, editor, read(request.param))


@pytest.fixture(scope="session")
def client(server):
    """The server on stand-ins, with every file and saved prompt that a workflow names."""
    standins.ensure()
    server.run(needed(read("save_prompt"), "IPA_SavePrompt"))
    return server


@pytest.fixture(scope="session")
def opened(client):
    """Open an address of the server as a browser does."""
    direct = request.build_opener(request.ProxyHandler({}))
    return lambda path: direct.open(f"http://{client.address}{path}")


@pytest.fixture(scope="session")
def object_info(client):
    """The host's node classes."""
    return client.object_info()


@pytest.fixture(scope="session")
def images():
    """Decode a run's images, [height, width, 3]: their files hold the prompt too."""

    def decode(result):
        files = (data for node in result.images.values() for data in node)
        return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float) for data in files]

    return decode
