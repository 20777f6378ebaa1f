"""``nox -s demo``: references down, λ across, and several texts over one reference, in one contact
sheet: output/demo.png.

python -m tools.demo [--models DIR] [--no-host] [--size 512] [--steps 50] [--seed 3] [--out FILE]

Starts a real ComfyUI with this pack and posts workflows/api/text_and_image.json for each picture,
on the miniature: models as small as a toy's that were trained for this, in ``miniature/``.
``--models`` names a folder of published ones, as ComfyUI/models is one (``checkpoints/``,
``clip_vision/``, ``ipadapter/`` with the public file names), to use instead. Without a ComfyUI, or
with ``--no-host``, diffusers draws the same sheet from the same files.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from miniature import setup, workflows
from miniature.scenes import SHAPES, caption
from tools import pictures
from tools.ask import Ask, Row, Shot
from tools.comfyui import install as host
from tools.sheet import contact_sheet

WORKFLOW = host.ROOT / "workflows" / "api" / "text_and_image.json"
OUTPUT = host.ROOT / "output" / "demo.png"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXTS = ("circle", "triangle", "ring", "square")  # over one reference, and then none
TOLD = ("star", "ring", "circle")  # over each reference, another shape than it shows
MINIATURE = "Miniature models of this repository, trained on pictures like the references."
PATIENCE = 6 * 3600.0  # seconds for a picture: real models on a CPU take minutes a step
LOADERS = {  # folder and input that names a file in it
    "CheckpointLoaderSimple": ("checkpoints", "ckpt_name"),
    "CLIPVisionLoader": ("clip_vision", "clip_name"),
    "IPA_LoadAdapter": ("ipadapter", "adapter_name"),
}
Workflow = dict[str, Any]


def of_class(prompt: Workflow, node_class: str) -> Iterator[dict[str, Any]]:
    """The inputs of every node of that class."""
    for node in prompt.values():
        if node["class_type"] == node_class:
            yield node["inputs"]


def adjusted(workflow: Workflow, ask: Ask, row: Row, shot: Shot) -> Workflow:
    """The workflow with the demo's values in place of its own."""
    prompt: Workflow = workflows.given(
        workflow,
        EmptyLatentImage={"width": ask.size, "height": ask.size, "batch_size": 1},
        KSampler={"steps": ask.steps, "seed": ask.seed, "cfg": ask.guidance},
        LoadImage={"image": row.file},
        IPA_Apply={"weight": shot.weight},
    )
    sampler = next(of_class(prompt, "KSampler"))
    prompt[sampler["positive"][0]]["inputs"]["text"] = shot.text
    prompt[sampler["negative"][0]]["inputs"]["text"] = ask.negative
    return prompt


def texts(workflow: Workflow) -> tuple[str, str]:
    """The workflow's positive and negative prompt."""
    sampler = next(of_class(workflow, "KSampler"))
    positive, negative = (workflow[sampler[side][0]]["inputs"] for side in ("positive", "negative"))
    return str(positive["text"]), str(negative["text"])


def drawn_steps(asked: int) -> int:
    """How many steps ComfyUI's ddim_uniform draws when asked for so many: it takes every
    (1000 // asked)-th time of the schedule, from the second on."""
    return len(range(1, 1000, max(1, 1000 // asked))) if asked > 0 else 0


def missing(workflow: Workflow, models: Path) -> list[str]:
    """Files that the workflow loads and that ``models`` lacks, relative to it."""
    named = [
        Path(folder, inputs[key])
        for loader, (folder, key) in LOADERS.items()
        for inputs in of_class(workflow, loader)
    ]
    return [str(path) for path in named if not (models / path).is_file()]


def show(shot: Shot, step: int, steps: int) -> None:
    """One line a step; on a terminal, one line a picture."""
    bar = "█" * round(24 * step / steps)
    live = sys.stdout.isatty()
    if not live and step < steps:
        return
    end = "\r" if live and step < steps else "\n"
    what = f"λ = {shot.weight:<4g} {shot.text[:24]:<24}"
    print(f"  {what} {bar:<24} step {step:>2} of {steps}", end=end, flush=True)


def on_miniature(seed: int, size: int | None, steps: int | None) -> Ask:
    """Three references that training never saw under growing λ, and one under several texts."""
    setup.ensure()
    opened = {
        name: Image.open(setup.base_directory() / "input" / name).convert("RGB")
        for name in setup.REFERENCES
    }
    rows = [
        Row(
            f'"{caption(SHAPES.index(told))}", the image gaining weight',
            name,
            picture,
            _growing(told),
        )
        for told, (name, picture) in zip(TOLD, opened.items(), strict=True)
    ]
    name, picture = next(iter(opened.items()))
    shots = [*(Shot(1.0, caption(SHAPES.index(told))) for told in TEXTS), Shot(1.0, "")]
    rows.append(
        Row("several texts over one reference, at full weight", name, picture, tuple(shots))
    )
    return Ask(
        tuple(rows),
        negative="",
        size=size or workflows.SIDE,
        steps=steps or workflows.STEPS,
        guidance=workflows.GUIDANCE,
        seed=seed,
    )


def _growing(told: str) -> tuple[Shot, ...]:
    return tuple(Shot(weight, caption(SHAPES.index(told))) for weight in WEIGHTS)


def on_published(workflow: Workflow, seed: int, size: int | None, steps: int | None) -> Ask:
    """The workflow's own text and the published settings."""
    positive, negative = texts(workflow)
    name = "reference.png"
    shots = tuple(Shot(weight, positive) for weight in WEIGHTS)
    row = Row(f'"{positive}", the image gaining weight', name, pictures.picture(name), shots)
    return Ask((row,), negative, size or 512, steps or 50, 7.5, seed)


def with_host(comfyui: Path, ask: Ask, models: Path | None) -> list[list[Image.Image]]:
    """Pictures of a ComfyUI server that runs this pack."""
    from tools.comfyui.server import Progress, Server

    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    made: list[list[Image.Image]] = []
    with tempfile.TemporaryDirectory() as folder:
        base, arguments = (
            _only(models, ask, Path(folder)) if models else (setup.base_directory(), ())
        )
        if models is None:
            workflow = workflows.on_miniature(workflow, "")
        print("Starting ComfyUI …", flush=True)
        threads = None if models else 1
        server = Server(base, comfyui, arguments, prompt_timeout=PATIENCE, threads=threads)
        with server as client:
            for row in ask.rows:
                print(row.title, flush=True)
                drawn: list[Image.Image] = []
                for shot in row.shots:

                    def on_progress(progress: Progress, shot: Shot = shot) -> None:
                        show(shot, progress.step, progress.total)

                    result = client.run(adjusted(workflow, ask, row, shot), on_progress)
                    (images,) = result.images.values()
                    drawn.append(Image.open(io.BytesIO(images[0])))
                made.append(drawn)
    return made


def _only(models: Path, ask: Ask, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A base directory without models, and ComfyUI's flags that add ``models`` to it."""
    base = folder / "base"
    (base / "input").mkdir(parents=True)
    for row in ask.rows:
        row.reference.save(base / "input" / row.file)
    paths = {"base_path": str(models), "is_default": True}
    paths |= {name: name for name, _ in LOADERS.values()}
    config = folder / "models.yaml"
    config.write_text(json.dumps({"demo": paths}), encoding="utf-8")  # JSON is YAML
    return base, ("--extra-model-paths-config", str(config))


def without_host(ask: Ask) -> list[list[Image.Image]]:
    """The same pictures from diffusers."""
    from tools import demo_diffusers

    print("Drawing with diffusers …", flush=True)
    return demo_diffusers.pictures(ask, show)


def _path(name: str) -> Path:
    return Path(name).expanduser().resolve()


def main() -> None:
    """Draw the sheet, and print its path as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=_path, help="folder of published models to use")
    parser.add_argument("--no-host", action="store_true", help="use diffusers, not ComfyUI")
    parser.add_argument("--size", type=int, help="side in pixels (64; published models: 512)")
    parser.add_argument("--steps", type=int, help="sampling steps (20; published models: 50)")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=_path, help="where the sheet is written")
    given = parser.parse_args()
    if given.models and given.no_host:
        parser.error("--models needs ComfyUI; leave --no-host out")
    if given.steps is not None and drawn_steps(given.steps) != given.steps:
        parser.error(
            f"--steps {given.steps}: ComfyUI's ddim_uniform would draw "
            f"{drawn_steps(given.steps)}; take a divisor of 1000, as 10, 20, 25, 40 or 50"
        )
    begun, out = time.monotonic(), given.out or OUTPUT
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    if given.models and (lacking := missing(workflow, given.models)):
        parser.error(f"{given.models} lacks {', '.join(lacking)}; the README says where it is")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    try:
        comfyui = None if given.no_host else host.locate()
    except host.HostMissing as error:
        sys.exit(str(error))
    if comfyui is None and not given.no_host:
        print(f"No ComfyUI found. {host.REMEDY}", flush=True)
        if given.models:
            sys.exit(1)
        print("Until then diffusers draws the same sheet.", flush=True)

    settings = given.seed, given.size, given.steps
    ask = on_published(workflow, *settings) if given.models else on_miniature(*settings)
    made = with_host(comfyui, ask, given.models) if comfyui else without_host(ask)
    notes = [] if given.models else [MINIATURE]
    if not comfyui:
        notes.append("Drawn by diffusers from the same files, in place of ComfyUI.")
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(ask.rows, made, notes).save(out)
    print(f"{sum(map(len, made))} pictures in {time.monotonic() - begun:.0f} s, start included")
    print(out)


if __name__ == "__main__":
    main()
