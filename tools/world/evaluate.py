"""``nox -s evaluate``: what the image prompt does on the miniature, measured through ComfyUI.

python -m tools.world.evaluate [--references 64] [--seed 0] [--seeds 3] [--no-figures]

Sends the shipped workflows to a real ComfyUI with this pack, for references that training never
saw, each with a text that names another shape than the reference shows, and lets an independent
judge (`judge.py`) say what of reference and text came through; then what more references, edges and
another base do (`findings.py`), over three seeds. Writes output/miniature.json and the figures
output/miniature-*.png.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from torch import Tensor

from tools import host
from tools.client import Client
from tools.host import ROOT
from tools.server import Server
from tools.world import concatenated, files, findings, setup
from tools.world.drawing import Drawer, Task
from tools.world.judge import Judge
from tools.world.measures import Chance, Similarity, chance, judge, share
from tools.world.scenes import KINDS, render, scenes
from tools.world.workflows import GUIDANCE, SIDE, STEPS

OUTPUT = ROOT / "output"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRUSTED = 512  # scenes on which the judge is judged


def measured(drawn: dict[str, Tensor], task: Task, judged: Judge) -> dict[str, Any]:
    """All figures from the pictures of each setting."""
    alike = Similarity()
    rows = task.rows

    def wanted(kind: str) -> Tensor:
        return task.told if kind == "shape" else getattr(rows, kind)

    def follows(name: str, kind: str) -> float:
        return share(judged(drawn[name])[kind], wanted(kind))

    def by_chance(name: str, kind: str) -> Chance:
        return chance(judged(drawn[name])[kind], wanted(kind))

    def similarity(name: str) -> float:
        return float(alike(drawn[name], task.pictures).mean())

    full = f"text {WEIGHTS[-1]:g}"
    unlike = alike(task.pictures, task.pictures.roll(1, 0)).mean()
    found: dict[str, Any] = {
        "colour_follows": follows(full, "colour"),
        "background_follows": follows(full, "background"),
        "texture_follows": follows(full, "texture"),
        "shape_kept": follows(full, "shape"),
        "colour_at_zero": follows("text 0", "colour"),
        "background_at_zero": follows("text 0", "background"),
        "texture_at_zero": follows("text 0", "texture"),
        "shape_at_zero": follows("text 0", "shape"),
        "chance": {kind: vars(by_chance("text 0", kind)) for kind in KINDS},
        "by_weight": {
            f"{weight:g}": {kind: follows(f"text {weight:g}", kind) for kind in KINDS}
            for weight in WEIGHTS
        },
        "image_similarity": {f"{w:g}": similarity(f"text {w:g}") for w in WEIGHTS},
        "image_similarity_of_strangers": float(unlike),
        "image_only": {
            **{kind: follows("image only", kind) for kind in KINDS if kind != "shape"},
            "shape_of_reference": share(judged(drawn["image only"])["shape"], rows.shape),
            "image_similarity": similarity("image only"),
        },
        "fine_grained": {
            **{kind: follows("fine-grained", kind) for kind in KINDS},
            "image_similarity": similarity("fine-grained"),
        },
        "described": {
            kind: share(judged(drawn["described"])[kind], getattr(rows, kind)) for kind in KINDS
        },
        "fine_grained_over_base": similarity("fine-grained") - similarity(full),
    }
    if "concatenated" in drawn:
        found["concatenated"] = {
            **{kind: follows("concatenated", kind) for kind in KINDS},
            "image_similarity": similarity("concatenated"),
        }
        found["decoupled_over_concatenated"] = similarity(full) - similarity("concatenated")
    return found


def run(client: Client, count: int, seed: int) -> tuple[dict[str, Any], dict[str, Tensor], Task]:
    """The figures, the pictures and the task."""
    task = Task.of(count, seed)
    draw = Drawer(client, task, setup.base_directory() / "input")
    drawn = {f"text {w:g}": draw("text_and_image", w) for w in WEIGHTS}
    drawn["image only"] = draw("image_only")
    drawn["fine-grained"] = draw("text_and_image", adapter="fine-grained")
    drawn["described"] = draw("text_and_image", 0.0, texts=task.rows.descriptions)
    drawn = {name: batches[:, 0] for name, batches in drawn.items()}
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
    }
    return found, drawn, task


def over_seeds(client: Client, count: int, seeds: int) -> dict[str, Any]:
    """The findings with `count` references and noises of each seed."""
    judged, alike = judge(), Similarity()
    inputs = setup.base_directory() / "input"
    drawers = [Drawer(client, Task.of(count, seed), inputs) for seed in range(seeds)]
    return {"references": count, "seeds": [findings.of(draw, judged, alike) for draw in drawers]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--references", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of references and noise")
    parser.add_argument("--findings", type=int, default=24, help="references of each finding")
    parser.add_argument("--seeds", type=int, default=3, help="of the findings; 0 for none")
    parser.add_argument("--no-figures", action="store_true")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = setup.ensure()
    with Server(base, host.require()) as client:
        found, drawn, task = run(client, asked.references, asked.seed)
        if asked.seeds:
            found["findings"] = over_seeds(client, asked.findings, asked.seeds)
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
