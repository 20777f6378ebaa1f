"""``nox -s evaluate``: what the image prompt does on the miniature, measured through ComfyUI.

python -m tools.world.evaluate [--references 64] [--seed 0] [--no-figures]

Sends the shipped workflows to a real ComfyUI with this pack, for references that training never
saw, each with a text that names another shape than the reference shows, and lets an independent
judge (`judge.py`) say what of reference and text came through. Writes output/miniature.json and
the figures output/miniature-*.png.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tools import host
from tools.client import Client
from tools.host import ROOT
from tools.server import Server
from tools.world import concatenated, files, image_encoder, setup
from tools.world.judge import Judge, ShapeClassifier
from tools.world.scenes import KINDS, SHAPES, Scenes, caption, render, scenes
from tools.world.workflows import GUIDANCE, SIDE, STEPS, given, on_miniature

logger = logging.getLogger("comfyui_ip_adapter.tools")
WORKFLOWS = ROOT / "workflows" / "api"
OUTPUT = ROOT / "output"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIRST = 1000  # of the shown stream: the workflows' own references lie before
TRUSTED = 512  # scenes on which the judge is judged


@dataclass(frozen=True)
class Task:
    """References, their pictures `(N, 3, 64, 64)`, and a text's shape for each, never its own."""

    rows: Scenes
    pictures: Tensor
    told: Tensor
    seeds: Sequence[int]

    @staticmethod
    def of(count: int, seed: int) -> Task:
        rows = scenes(setup.SHOWN, count, FIRST + seed * count)
        shift = 1 + torch.arange(count) % (len(SHAPES) - 1)
        told = (rows.shape + shift) % len(SHAPES)
        return Task(rows, render(rows, SIDE), told, [seed * count + i for i in range(count)])


class Drawer:
    """Draws the task's references through one workflow after the other."""

    def __init__(self, client: Client, task: Task, inputs: Path) -> None:
        self.client, self.task = client, task
        inputs.mkdir(parents=True, exist_ok=True)
        self.names = [f"evaluated_{number}.png" for number in task.seeds]
        for name, number in zip(self.names, range(len(task.rows)), strict=True):
            setup.picture(task.rows[number : number + 1]).save(inputs / name)

    def __call__(self, workflow: str, weight: float, adapter: str) -> Tensor:
        """Pictures `(N, 3, 64, 64)`, one a reference, from workflows/api/`workflow`.json."""
        api = json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"))
        made, begun = [], time.monotonic()
        for name, seed, told in zip(
            self.names, self.task.seeds, self.task.told.tolist(), strict=True
        ):
            prompt = given(
                on_miniature(api, caption(told), adapter),
                LoadImage={"image": name},
                IPA_Apply={"weight": weight},
                KSampler={"seed": seed},
            )
            (images,) = self.client.run(prompt).images.values()
            made.append(as_tensor(Image.open(io.BytesIO(images[0]))))
        seconds = time.monotonic() - begun
        logger.info("%s, λ = %g, %s: %.0f s", workflow, weight, adapter, seconds)
        return torch.stack(made)


def as_tensor(picture: Image.Image) -> Tensor:
    """`(3, h, w)`, 0 … 1."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array).movedim(-1, 0)


class Similarity:
    """Cosine of image embeddings, in open_clip: how alike two pictures are to the encoder."""

    def __init__(self) -> None:
        self.visual = image_encoder.tower(files.FOLDER / files.ENCODER)

    @torch.no_grad()
    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """`(N,)`"""
        embeds = [self.visual(image_encoder.normalised(pictures)) for pictures in (one, other)]
        return cosine_similarity(*embeds)


def judge() -> Judge:
    """With the shipped classifier of shapes."""
    classifier = ShapeClassifier()
    state = load_file(files.FOLDER / files.JUDGE)
    classifier.load_state_dict(
        {k: x.float() if x.is_floating_point() else x for k, x in state.items()}
    )
    return Judge(classifier.eval().requires_grad_(False))


def measured(drawn: dict[str, Tensor], task: Task, judged: Judge) -> dict[str, Any]:
    """All figures from the pictures of each setting."""
    alike = Similarity()
    rows = task.rows

    def share(name: str, kind: str) -> float:
        wanted = task.told if kind == "shape" else getattr(rows, kind)
        return float((judged(drawn[name])[kind] == wanted).float().mean())

    def similarity(name: str) -> float:
        return float(alike(drawn[name], task.pictures).mean())

    full = f"text {WEIGHTS[-1]:g}"
    unlike = alike(task.pictures, task.pictures.roll(1, 0)).mean()
    found: dict[str, Any] = {
        "colour_follows": share(full, "colour"),
        "background_follows": share(full, "background"),
        "texture_follows": share(full, "texture"),
        "shape_kept": share(full, "shape"),
        "colour_at_zero": share("text 0", "colour"),
        "background_at_zero": share("text 0", "background"),
        "texture_at_zero": share("text 0", "texture"),
        "shape_at_zero": share("text 0", "shape"),
        "chance": {kind: 1 / number for kind, number in KINDS.items()},
        "by_weight": {
            f"{weight:g}": {kind: share(f"text {weight:g}", kind) for kind in KINDS}
            for weight in WEIGHTS
        },
        "image_similarity": {f"{w:g}": similarity(f"text {w:g}") for w in WEIGHTS},
        "image_similarity_of_strangers": float(unlike),
        "image_only": {
            **{kind: share("image only", kind) for kind in KINDS if kind != "shape"},
            "shape_of_reference": float(
                (judged(drawn["image only"])["shape"] == rows.shape).float().mean()
            ),
            "image_similarity": similarity("image only"),
        },
        "fine_grained": {
            **{kind: share("fine-grained", kind) for kind in KINDS},
            "image_similarity": similarity("fine-grained"),
        },
        "fine_grained_over_base": similarity("fine-grained") - similarity(full),
    }
    if "concatenated" in drawn:
        found["concatenated"] = {
            **{kind: share("concatenated", kind) for kind in KINDS},
            "image_similarity": similarity("concatenated"),
        }
        found["decoupled_over_concatenated"] = similarity(full) - similarity("concatenated")
    return found


def chance_interval(chance: float, count: int) -> tuple[float, float]:
    """Where a share of `count` draws lies 99 times in 100 if only chance is at work."""
    spread = 2.58 * math.sqrt(chance * (1 - chance) / count)
    return max(0.0, chance - spread), min(1.0, chance + spread)


def run(client: Client, count: int, seed: int) -> tuple[dict[str, Any], dict[str, Tensor], Task]:
    """The figures, the pictures and the task."""
    task = Task.of(count, seed)
    draw = Drawer(client, task, setup.base_directory() / "input")
    drawn = {f"text {w:g}": draw("text_and_image", w, "base") for w in WEIGHTS}
    drawn["image only"] = draw("image_only", 1.0, "base")
    drawn["fine-grained"] = draw("text_and_image", 1.0, "fine-grained")
    if files.CONCATENATED in files.manifest()["files"]:
        drawn["concatenated"] = concatenated.draw(task.pictures, task.told.tolist(), task.seeds)
    judged = judge()
    known = scenes(setup.SHOWN, TRUSTED, 1 << 20)
    found = measured(drawn, task, judged)
    found |= {
        "references": count,
        "seed": seed,
        "sampling": {"sampler": "ddim", "steps": STEPS, "guidance": GUIDANCE, "side": SIDE},
        "judge_accuracy": judged.accuracy(render(known, SIDE), known),
        "chance_interval": {k: chance_interval(1 / n, count) for k, n in KINDS.items()},
    }
    return found, drawn, task


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--references", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of references and noise")
    parser.add_argument("--no-figures", action="store_true")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = setup.ensure()
    with Server(base, host.require()) as client:
        found, drawn, task = run(client, asked.references, asked.seed)
    OUTPUT.mkdir(exist_ok=True)
    target = OUTPUT / "miniature.json"
    target.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not asked.no_figures:
        from tools.world import figures

        for path in figures.draw(found, drawn, task, OUTPUT):
            print(path)
    print(json.dumps(found, indent=1))
    print(target)


if __name__ == "__main__":
    main()
