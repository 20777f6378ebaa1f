"""Measure on the miniature what the image prompt does, through ComfyUI (`nox -s evaluate`).

python -m miniature.evaluate [--references 64] [--seed 0] [--findings 24] [--seeds 3]
                             [--servers 2] [--no-figures] [--out FILE]

Sends the shipped workflows to a real ComfyUI with this pack, for references that training never
saw, each with a text that names another shape than the reference shows, and lets an independent
classifier say what of reference and text came through; then the experiments (`experiments.py`),
with three sets of references and noises. Writes output/miniature.json and beside it the figures
miniature-*.png, says what of it is as it has to be (`thresholds.py`), and fails where something is
not.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniature import assemble, concatenated, experiments, files
from miniature.metrics import SceneClassifier, Similarity, chance, interval, share
from miniature.scenes import KINDS, outlined, render, scenes
from miniature.thresholds import demands
from miniature.through_comfyui import Drawer, Task
from miniature.workflows import GUIDANCE, SIDE, STEPS, Api, given
from tools.comfyui import install
from tools.comfyui.client import Client
from tools.comfyui.server import Server

OUTPUT = install.ROOT / "output"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOOKS = ("colour", "background", "texture")
AT_ZERO = 4  # images of each reference at λ = 0, where chance has to be told from a leak
LEAST = 8  # references, among which pairs that differ in all are found
TRUSTED = 512  # scenes on which the classifier is tried


def measured(drawn: dict[str, Tensor], task: Task, classify: SceneClassifier) -> dict[str, Any]:
    """Compute all figures from the images of each setting, `(N, k, 3, h, w)`, k a reference."""
    alike, rows = Similarity(), task.rows
    asked = render(replace(rows, shape=task.shapes), SIDE)  # references with the texts' shapes
    shown = {name: _shown(classify, images) for name, images in drawn.items()}
    wanted = {kind: getattr(rows, kind) for kind in KINDS} | {"shape": task.shapes}

    def follows(name: str, kind: str) -> float:
        return share(shown[name][kind], wanted[kind][:, None])

    def likeness(name: str, others: Tensor) -> float:
        return float(torch.stack([alike(x, others) for x in drawn[name].transpose(0, 1)]).mean())

    def setting(name: str) -> dict[str, float]:
        return {
            **{kind: follows(name, kind) for kind in KINDS},
            "image_similarity": likeness(name, task.images),
            "similarity_to_asked": likeness(name, asked),
        }

    names = {f"{weight:g}": f"text {weight:g}" for weight in WEIGHTS}
    none, *_, full = names.values()
    by_weight = {w: {kind: follows(name, kind) for kind in KINDS} for w, name in names.items()}
    found: dict[str, Any] = {
        **{f"{kind}_follows": follows(full, kind) for kind in LOOKS},
        "shape_kept": follows(full, "shape"),
        **{f"{kind}_at_zero": follows(none, kind) for kind in KINDS},
        "chance": {kind: chance(shown[none][kind], wanted[kind]) for kind in KINDS},
        "intervals": {
            kind: interval(shown[full][kind], wanted[kind][:, None].expand_as(shown[full][kind]))
            for kind in KINDS
        },
        "by_weight": by_weight,
        "image_similarity": {w: likeness(name, task.images) for w, name in names.items()},
        "image_similarity_of_strangers": float(alike(task.images, task.images.roll(1, 0)).mean()),
        "image_only": {
            **{kind: follows("image only", kind) for kind in LOOKS},
            "shape_of_reference": share(shown["image only"]["shape"], rows.shape[:, None]),
            "image_similarity": likeness("image only", task.images),
        },
        "fine_grained": setting("fine-grained"),
        "concatenated": setting("concatenated"),
        "described": {
            kind: share(shown["described"][kind], getattr(rows, kind)[:, None]) for kind in KINDS
        },
        "similarity_to_asked": likeness(full, asked),
    }
    base, fine, theirs = (
        at["similarity_to_asked"] for at in (found, found["fine_grained"], found["concatenated"])
    )
    return found | {
        "fine_grained_over_base": fine - base,
        "decoupled_over_concatenated": base - theirs,
    }


def _shown(classify: SceneClassifier, images: Tensor) -> dict[str, Tensor]:
    found = classify(images.flatten(0, 1))
    return {kind: values.unflatten(0, images.shape[:2]) for kind, values in found.items()}


def noises(count: int) -> Callable[[Api], Api]:
    """Return a change of a workflow so that it draws `count` images at once."""
    return lambda api: given(api, EmptyLatentImage={"batch_size": count})


def run(
    clients: Sequence[Client], count: int, seed: int
) -> tuple[dict[str, Any], dict[str, Tensor], Task]:
    """Return the figures, the images and the task."""
    task = Task.of(count, seed)
    draw = Drawer(clients, task, assemble.base_directory() / "input")
    drawn = {
        f"text {w:g}": draw("text_and_image", w, "base", change=None if w else noises(AT_ZERO))
        for w in WEIGHTS
    }
    drawn["image only"] = draw("image_only", adapter="base")
    drawn["fine-grained"] = draw("text_and_image", adapter="fine-grained")
    drawn["described"] = draw("text_and_image", 0.0, texts=task.rows.descriptions)
    drawn["concatenated"] = concatenated.draw(task, task.texts)[:, None]
    classify = SceneClassifier()
    known = scenes(assemble.SHOWN, TRUSTED, 1 << 20)
    found = measured(drawn, task, classify)
    found |= {
        "references": count,
        "seed": seed,
        "pictures_at_zero": count * AT_ZERO,
        "sampling": {"sampler": "ddim", "steps": STEPS, "guidance": GUIDANCE, "side": SIDE},
        "judge_accuracy": classify.accuracy(render(known, SIDE), known),
        "judge_accuracy_outlined": classify.accuracy(outlined(known, SIDE), known),
    }
    return found, drawn, task


def experiment(clients: Sequence[Client], count: int, seed: int) -> dict[str, Any]:
    """Return the experiments' figures with `count` references and noises of that set."""
    draw = Drawer(clients, Task.of(count, seed), assemble.base_directory() / "input")
    return experiments.every(draw, SceneClassifier(), Similarity())


def write(found: dict[str, Any], target: Path) -> None:
    """Write the figures as JSON."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--references", type=_some, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of references and noise")
    parser.add_argument("--findings", type=_some, default=24, help="references of each finding")
    parser.add_argument("--seeds", type=int, default=3, help="sets of the findings; 0 for none")
    parser.add_argument(
        "--servers",
        type=int,
        choices=range(1, 65),
        metavar="N",
        default=min(torch.get_num_threads(), 4),
        help="that draw",
    )
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--out", type=Path, default=OUTPUT / "miniature.json")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base, made = assemble.ensure(), files.made()
    comfyui = install.require()
    with ExitStack() as stack:
        # Images are so small that two processors draw two of them sooner than one after the other
        servers = [Server(base, comfyui, threads=1) for _ in range(asked.servers)]
        clients = [stack.enter_context(server) for server in servers]
        found, drawn, task = run(clients, asked.references, asked.seed)
        found |= {"build": files.checksums(), "made": made}
        write(found, asked.out)
        for number in range(asked.seeds):
            known = found.setdefault("findings", {"references": asked.findings, "sets": []})
            known["sets"].append(experiment(clients, asked.findings, asked.seed + 1 + number))
            write(found, asked.out)
    if not asked.no_figures:
        from miniature import model_card

        curves, sheet = (
            asked.out.with_name(f"miniature-{name}.png") for name in ("curves", "sheet")
        )
        model_card.plot(found, curves)
        model_card.references_sheet(drawn, task).save(sheet)
        print(curves, sheet, sep="\n")
    asked_for = [*demands(found)]
    print(*asked_for, asked.out, sep="\n")
    if not all(demand.met for demand in asked_for):
        sys.exit("Not everything is as it has to be: the lines with MISS say what.")


def _some(text: str) -> int:
    number = int(text)
    if number < LEAST:
        raise argparse.ArgumentTypeError(f"{number} references tell too little: {LEAST} or more")
    return number


if __name__ == "__main__":
    main()
