"""A server on the miniature, and its images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miniature import assemble
from miniature.metrics import SceneClassifier
from miniature.through_comfyui import WORKFLOWS
from tools.comfyui.client import Client


@pytest.fixture(scope="session")
def base_directory() -> Path:
    """ComfyUI's base directory of the miniature."""
    return assemble.ensure()


@pytest.fixture(scope="session")
def client(miniature_server: Client) -> Client:
    """A ComfyUI server with this pack that runs on the miniature."""
    return miniature_server


@pytest.fixture(scope="session")
def workflow() -> Callable[[str], dict[str, Any]]:
    """A workflow of workflows/api by name."""
    return lambda name: json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def classify() -> SceneClassifier:
    return SceneClassifier()
