"""Images for many references, drawn by ComfyUI on the miniature through shipped workflows."""

from __future__ import annotations

import io
import itertools
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from PIL import Image
from torch import Tensor

from miniature import assemble
from miniature.scenes import SHAPES, Scenes, caption, render, scenes, to_tensor
from miniature.workflows import SIDE, Api, given, on_miniature
from tools.comfyui.client import Client
from tools.comfyui.install import ROOT

logger = logging.getLogger("comfyui_ip_adapter.tools")
WORKFLOWS = ROOT / "workflows" / "api"
FIRST = 1000  # of the shown stream: the workflows' own references lie before
APART = 1 << 16  # scenes and noises from one set's first to the next one's


@dataclass(frozen=True)
class Task:
    """References, their images `(N, 3, 64, 64)`, and a text's shape for each, never its own."""

    rows: Scenes
    images: Tensor
    shapes: Tensor
    seeds: Sequence[int]

    @staticmethod
    def of(count: int, seed: int) -> Task:
        """Make set number `seed`; no two share a reference or a noise."""
        rows = scenes(assemble.SHOWN, count, FIRST + seed * APART)
        shift = 1 + torch.arange(count) % (len(SHAPES) - 1)
        shapes = (rows.shape + shift) % len(SHAPES)
        return Task(rows, render(rows, SIDE), shapes, [seed * APART + i for i in range(count)])

    @property
    def texts(self) -> list[str]:
        return [caption(shape) for shape in self.shapes.tolist()]


class Drawer:
    """Draws a task's references through one workflow after the other."""

    def __init__(self, clients: Sequence[Client], task: Task, inputs: Path) -> None:
        """Take `clients` of servers that share the work, and their folder of input images."""
        self.clients, self.task, self.inputs = clients, task, inputs
        self.names = self.write_inputs("evaluated", task.rows)

    def write_inputs(self, stem: str, rows: Scenes) -> list[str]:
        """Write the scenes as input images; returns their names."""
        self.inputs.mkdir(parents=True, exist_ok=True)
        names = [f"{stem}_{number}.png" for number in self.task.seeds]
        for at, name in enumerate(names):
            assemble.shown(rows[at : at + 1]).save(self.inputs / name)
        return names

    def __call__(
        self,
        workflow: str,
        weight: float = 1.0,
        adapter: str | None = None,
        *,
        texts: Sequence[str] | None = None,
        others: Sequence[str] | None = None,
        change: Callable[[Api], Api] | None = None,
    ) -> Tensor:
        """Draw images `(N, batch, 3, 64, 64)`, a batch a reference, through that workflow.

        `texts`: by default the task's; `others`: the images of the workflow's second LoadImage;
        `change`: of the workflow, last.
        """
        api = json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"))
        free: SimpleQueue[Client] = SimpleQueue()
        for client in self.clients:
            free.put(client)

        def drawn(number: int) -> Tensor:
            prompt = given(
                on_miniature(api, (texts or self.task.texts)[number], adapter),
                IPA_Apply={"weight": weight},
                KSampler={"seed": self.task.seeds[number]},
            )
            names = [self.names[number], *([others[number]] if others else [])]
            loaders = [node for node in prompt.values() if node["class_type"] == "LoadImage"]
            for loader, name in zip(loaders, itertools.cycle(names)):
                loader["inputs"]["image"] = name
            prompt = change(prompt) if change else prompt
            (saved,) = (i for i, node in prompt.items() if node["class_type"] == "SaveImage")
            client = free.get()
            try:
                images = client.run(prompt).images[saved]  # previews are no results
            finally:
                free.put(client)
            return torch.stack([to_tensor(Image.open(io.BytesIO(image))) for image in images])

        begun = time.monotonic()
        with ThreadPoolExecutor(len(self.clients)) as pool:
            images = torch.stack([*pool.map(drawn, range(len(self.task.seeds)))])
        seconds = time.monotonic() - begun
        logger.info("%s, λ = %g, %s: %.0f s", workflow, weight, adapter or "its own", seconds)
        return images
