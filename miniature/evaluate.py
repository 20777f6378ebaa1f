"""``nox -s evaluate``: what the image prompt does on the miniature, measured through ComfyUI.

python -m miniature.evaluate [--references 64] [--seed 0] [--findings 24] [--seeds 3]
                               [--servers 2] [--no-figures] [--out FILE]

Sends the shipped workflows to a real ComfyUI with this pack, for references that training never
saw, each with a text that names another shape than the reference shows, and lets an independent
judge (`judge.py`) say what of reference and text came through; then what more references, edges and
another base do (`findings.py`), with three sets of references and noises. Writes
output/miniature.json and beside it the figures miniature-*.png, says what of it is as it has to be
(`must.py`), and fails where something is not.
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

from miniature import concatenated, files, findings, setup
from miniature import thresholds as must
from miniature.classifier import Judge
from miniature.drawing import Drawer, Task
from miniature.metrics import Similarity, chance, interval, judge, share
from miniature.scenes import KINDS, outlined, render, scenes
from miniature.workflows import GUIDANCE, SIDE, STEPS, Api, given
from tools.comfyui import install as host
from tools.comfyui.client import Client
from tools.comfyui.install import ROOT
from tools.comfyui.server import Server

OUTPUT = ROOT / "output"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOOKS = ("colour", "background", "texture")
AT_ZERO = 4  # pictures of each reference at λ = 0, where chance has to be told from a leak
LEAST = 8  # references, among which pairs that differ in all are found
TRUSTED = 512  # scenes on which the judge is judged


def measured(drawn: dict[str, Tensor], task: Task, judged: Judge) -> dict[str, Any]:
    """All figures from the pictures of each setting, `(N, k, 3, h, w)`, k of each reference."""
    alike = Similarity()
    rows = task.rows
    seen = {name: _seen(judged, pictures) for name, pictures in drawn.items()}

    def wanted(kind: str) -> Tensor:
        return task.told if kind == "shape" else getattr(rows, kind)

    def follows(name: str, kind: str) -> float:
        return share(seen[name][kind], wanted(kind)[:, None])

    def similarity(name: str) -> float:
        pictures = drawn[name].transpose(0, 1)
        return float(torch.stack([alike(some, task.pictures) for some in pictures]).mean())

    asked = render(replace(rows, shape=task.told), SIDE)

    def to_asked(name: str) -> float:
        """Likeness to the reference with the shape of the text."""
        return float(
            torch.stack([alike(some, asked) for some in drawn[name].transpose(0, 1)]).mean()
        )

    def setting(name: str) -> dict[str, float]:
        figures = {kind: follows(name, kind) for kind in KINDS}
        likeness = {"image_similarity": similarity(name), "similarity_to_asked": to_asked(name)}
        return {**figures, **likeness}

    full, none = f"text {WEIGHTS[-1]:g}", f"text {WEIGHTS[0]:g}"
    unlike = alike(task.pictures, task.pictures.roll(1, 0)).mean()
    likeness = [similarity(f"text {weight:g}") for weight in WEIGHTS]
    found: dict[str, Any] = {
        **{f"{kind}_follows": follows(full, kind) for kind in LOOKS},
        "shape_kept": follows(full, "shape"),
        **{f"{kind}_at_zero": follows(none, kind) for kind in KINDS},
        "chance": {kind: vars(chance(seen[none][kind], wanted(kind))) for kind in KINDS},
        "intervals": {
            kind: interval(seen[full][kind], wanted(kind)[:, None].expand_as(seen[full][kind]))
            for kind in KINDS
        },
        "by_weight": {
            f"{weight:g}": {kind: follows(f"text {weight:g}", kind) for kind in KINDS}
            for weight in WEIGHTS
        },
        "image_similarity": {f"{w:g}": x for w, x in zip(WEIGHTS, likeness, strict=True)},
        "image_similarity_of_strangers": float(unlike),
        "image_only": {
            **{kind: follows("image only", kind) for kind in LOOKS},
            "shape_of_reference": share(seen["image only"]["shape"], rows.shape[:, None]),
            "image_similarity": similarity("image only"),
        },
        "fine_grained": setting("fine-grained"),
        "described": {
            kind: share(seen["described"][kind], getattr(rows, kind)[:, None]) for kind in KINDS
        },
        "similarity_to_asked": to_asked(full),
        "fine_grained_over_base": to_asked("fine-grained") - to_asked(full),
    }
    if "concatenated" in drawn:
        found["concatenated"] = setting("concatenated")
        found["decoupled_over_concatenated"] = to_asked(full) - to_asked("concatenated")
    return found


def _seen(judged: Judge, pictures: Tensor) -> dict[str, Tensor]:
    found = judged(pictures.flatten(0, 1))
    return {kind: values.unflatten(0, pictures.shape[:2]) for kind, values in found.items()}


def noises(count: int) -> Callable[[Api], Api]:
    """A workflow that draws `count` pictures at once."""
    return lambda api: given(api, EmptyLatentImage={"batch_size": count})


def run(
    clients: Sequence[Client], count: int, seed: int
) -> tuple[dict[str, Any], dict[str, Tensor], Task]:
    """The figures, the pictures and the task."""
    task = Task.of(count, seed)
    draw = Drawer(clients, task, setup.base_directory() / "input")
    drawn = {
        f"text {w:g}": draw("text_and_image", w, "base", change=None if w else noises(AT_ZERO))
        for w in WEIGHTS
    }
    drawn["image only"] = draw("image_only", adapter="base")
    drawn["fine-grained"] = draw("text_and_image", adapter="fine-grained")
    drawn["described"] = draw("text_and_image", 0.0, texts=task.rows.descriptions)
    if files.CONCATENATED in files.manifest()["files"]:
        drawn["concatenated"] = concatenated.draw(task, task.texts)[:, None]
    judged = judge()
    known = scenes(setup.SHOWN, TRUSTED, 1 << 20)
    found = measured(drawn, task, judged)
    found |= {
        "references": count,
        "seed": seed,
        "pictures_at_zero": count * AT_ZERO,
        "sampling": {"sampler": "ddim", "steps": STEPS, "guidance": GUIDANCE, "side": SIDE},
        "judge_accuracy": judged.accuracy(render(known, SIDE), known),
        "judge_accuracy_outlined": judged.accuracy(outlined(known, SIDE), known),
    }
    return found, drawn, task


def findings_of(clients: Sequence[Client], count: int, seed: int) -> dict[str, Any]:
    """The findings with `count` references and noises of that set."""
    draw = Drawer(clients, Task.of(count, seed), setup.base_directory() / "input")
    return findings.of(draw, judge(), Similarity())


def write(found: dict[str, Any], target: Path) -> None:
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
    base, made = setup.ensure(), files.made()
    comfyui = host.require()
    with ExitStack() as stack:
        # Pictures are so small that two processors draw two of them sooner than one after the other
        servers = [Server(base, comfyui, threads=1) for _ in range(asked.servers)]
        clients = [stack.enter_context(server) for server in servers]
        found, drawn, task = run(clients, asked.references, asked.seed)
        found |= {"build": files.checksums(), "made": made}
        write(found, asked.out)
        for number in range(asked.seeds):
            known = found.setdefault("findings", {"references": asked.findings, "sets": []})
            known["sets"].append(findings_of(clients, asked.findings, asked.seed + 1 + number))
            write(found, asked.out)
    if not asked.no_figures:
        from miniature import figures

        for path in figures.draw(found, drawn, task, asked.out.parent):
            print(path)
    asked_for = [*must.demands(found)]
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
