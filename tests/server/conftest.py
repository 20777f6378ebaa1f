"""A workflow that runs within a second, for many prompts to one server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.workflows.api import smaller

API = Path(__file__).parents[2] / "workflows" / "api"


class Graph(dict):
    """A workflow for the server, its nodes found by class."""

    def of(self, class_type: str) -> str:
        return next(k for k, node in self.items() if node["class_type"] == class_type)

    def set(self, class_type: str, **inputs: Any) -> Graph:
        self[self.of(class_type)]["inputs"].update(inputs)
        return self

    def add(self, class_type: str, **inputs: Any) -> list[Any]:
        """Add a node, named like its class, and return the link to its first output."""
        self[class_type] = {"class_type": class_type, "inputs": inputs}
        return [class_type, 0]


@pytest.fixture(scope="session")
def graph() -> Callable[..., Graph]:
    """Return what makes the named workflow with one step at 64 px.

    It ends in latents: the decoder takes longest.
    """

    def made(name: str = "text_and_image") -> Graph:
        made = Graph(smaller(json.loads((API / f"{name}.json").read_text()), steps=1, side=64))
        for class_type in ("SaveImage", "VAEDecode"):
            del made[made.of(class_type)]
        made.add("SaveLatent", samples=[made.of("KSampler"), 0], filename_prefix="test")
        return made

    return made
