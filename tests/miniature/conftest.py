"""A server on the miniature, and its pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from miniature import setup
from miniature.classifier import Judge
from miniature.drawing import WORKFLOWS, as_tensor
from miniature.metrics import judge
from tools.comfyui.server import Client


@pytest.fixture(scope="session")
def world() -> Path:
    """ComfyUI's base directory of the miniature."""
    return setup.ensure()


@pytest.fixture(scope="session")
def client(miniature_server: Client) -> Client:
    """A ComfyUI server with this pack that runs on the miniature."""
    return miniature_server


@pytest.fixture(scope="session")
def drawn(client: Client) -> Callable[[dict[str, Any]], torch.Tensor]:
    """Runs a workflow: its pictures, `(N, 3, h, w)`, 0 … 1."""

    def run(prompt: dict[str, Any]) -> torch.Tensor:
        (images,) = client.run(prompt).images.values()
        return torch.stack([as_tensor(Image.open(io.BytesIO(image))) for image in images])

    return run


@pytest.fixture(scope="session")
def workflow() -> Callable[[str], dict[str, Any]]:
    """A workflow of workflows/api by name."""
    return lambda name: json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def judged() -> Judge:
    return judge()
