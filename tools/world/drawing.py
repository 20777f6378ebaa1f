"""Pictures of the miniature for many references, drawn by ComfyUI through shipped workflows."""

from __future__ import annotations

import io
import itertools
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.client import Client
from tools.host import ROOT
from tools.world import setup
from tools.world.scenes import SHAPES, Scenes, caption, render, scenes
from tools.world.workflows import SIDE, Api, given, on_miniature

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

    def __init__(self, client: Client, task: Task, inputs: Path) -> None:
        """`inputs`: the server's folder of input pictures."""
        self.client, self.task, self.inputs = client, task, inputs
        self.names = self.lay("evaluated", task.rows)

    def lay(self, stem: str, rows: Scenes) -> list[str]:
        """Write the scenes as input pictures; returns their names."""
        return self.put(stem, [setup.picture(rows[at : at + 1]) for at in range(len(rows))])

    def put(self, stem: str, pictures: Sequence[Image.Image]) -> list[str]:
        """Write a picture for each reference; returns their names."""
        self.inputs.mkdir(parents=True, exist_ok=True)
        names = [f"{stem}_{number}.png" for number in self.task.seeds]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(self.inputs / name)
        return names

    def __call__(
        self,
        workflow: str,
        weight: float = 1.0,
        adapter: str | None = None,
        *,
        texts: Sequence[str] | None = None,
        others: Sequence[str] | None = None,
        masks: Sequence[str] | None = None,
        change: Callable[[Api], Api] | None = None,
    ) -> Tensor:
        """Pictures `(N, batch, 3, 64, 64)`, a batch a reference, from a workflow in workflows/api/.

        `adapter`: as `on_miniature` takes it. `texts`: the task's by default. `others`: the picture
        of the workflow's second LoadImage, for each reference; `masks`: that of its LoadImageMask.
        `change`: of the workflow, last.
        """
        api = json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"))
        made, begun = [], time.monotonic()
        for number, seed in enumerate(self.task.seeds):
            prompt = given(
                on_miniature(api, (texts or self.task.texts)[number], adapter),
                IPA_Apply={"weight": weight},
                KSampler={"seed": seed},
            )
            names = [self.names[number], *([others[number]] if others else [])]
            loaders = [node for node in prompt.values() if node["class_type"] == "LoadImage"]
            for loader, name in zip(loaders, itertools.cycle(names)):
                loader["inputs"]["image"] = name
            if masks:
                prompt = given(prompt, LoadImageMask={"image": masks[number]})
            prompt = change(prompt) if change else prompt
            (saved,) = (i for i, node in prompt.items() if node["class_type"] == "SaveImage")
            images = self.client.run(prompt).images[saved]  # previews are no results
            made.append(
                torch.stack([as_tensor(Image.open(io.BytesIO(picture))) for picture in images])
            )
        seconds = time.monotonic() - begun
        logger.info("%s, λ = %g, %s: %.0f s", workflow, weight, adapter or "its own", seconds)
        return torch.stack(made)


def as_tensor(picture: Image.Image) -> Tensor:
    """`(3, h, w)`, 0 … 1."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array).movedim(-1, 0)
