"""Pictures of the miniature for many references, drawn by ComfyUI through shipped workflows."""

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

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniature import setup
from miniature.scenes import SHAPES, Scenes, caption, render, scenes
from miniature.workflows import SIDE, Api, given, on_miniature
from tools.comfyui.client import Client
from tools.comfyui.install import ROOT

logger = logging.getLogger("comfyui_ip_adapter.tools")
WORKFLOWS = ROOT / "workflows" / "api"
FIRST = 1000  # of the shown stream: the workflows' own references lie before
APART = 1 << 16  # scenes and noises from one set's first to the next one's


@dataclass(frozen=True)
class Task:
    """References, their pictures `(N, 3, 64, 64)`, and a text's shape for each, never its own."""

    rows: Scenes
    pictures: Tensor
    told: Tensor
    seeds: Sequence[int]

    @staticmethod
    def of(count: int, seed: int) -> Task:
        """Set number `seed`; no two share a reference or a noise."""
        rows = scenes(setup.SHOWN, count, FIRST + seed * APART)
        shift = 1 + torch.arange(count) % (len(SHAPES) - 1)
        told = (rows.shape + shift) % len(SHAPES)
        return Task(rows, render(rows, SIDE), told, [seed * APART + i for i in range(count)])

    @property
    def texts(self) -> list[str]:
        return [caption(shape) for shape in self.told.tolist()]


class Drawer:
    """Draws a task's references through one workflow after the other."""

    def __init__(self, clients: Sequence[Client], task: Task, inputs: Path) -> None:
        """`clients`: of servers that share the work. `inputs`: their folder of input pictures."""
        self.clients, self.task, self.inputs = clients, task, inputs
        self.names = self.lay("evaluated", task.rows)

    def lay(self, stem: str, rows: Scenes) -> list[str]:
        """Write the scenes as input pictures; returns their names."""
        self.inputs.mkdir(parents=True, exist_ok=True)
        names = [f"{stem}_{number}.png" for number in self.task.seeds]
        for at, name in enumerate(names):
            setup.picture(rows[at : at + 1]).save(self.inputs / name)
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
        """Pictures `(N, batch, 3, 64, 64)`, a batch a reference, from a workflow in workflows/api/.

        `adapter`: as `on_miniature` takes it. `texts`: the task's by default. `others`: the picture
        of the workflow's second LoadImage, for each reference. `change`: of the workflow, last.
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
            return torch.stack([as_tensor(Image.open(io.BytesIO(picture))) for picture in images])

        begun = time.monotonic()
        with ThreadPoolExecutor(len(self.clients)) as pool:
            made = torch.stack([*pool.map(drawn, range(len(self.task.seeds)))])
        seconds = time.monotonic() - begun
        logger.info("%s, λ = %g, %s: %.0f s", workflow, weight, adapter or "its own", seconds)
        return made


def as_tensor(picture: Image.Image) -> Tensor:
    """`(3, h, w)`, 0 … 1."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array).movedim(-1, 0)
