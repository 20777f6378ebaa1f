"""Draw output/demo.png, as `nox -s demo` does: references down, λ across, and several texts.

    python -m tools.demo [--models DIR] [--no-host] [--size 512] [--steps 50] [--seed 3] [--out F]

Starts a real ComfyUI with this pack and posts workflows/api/text_and_image.json for each image, on
the miniature: models as small as a toy's that were trained for this, in `miniature/`. `--models`
names a folder of published ones, as ComfyUI/models is one (`checkpoints/`, `clip_vision/`,
`ipadapter/` with the public file names), to use instead. Without a ComfyUI, or with `--no-host`,
diffusers draws the same sheet from the same files.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ip_adapter_core.contact_sheet import Layout, Row, contact_sheet
from miniature import assemble, workflows
from miniature.scenes import SHAPES, caption
from tools import reference_images
from tools.comfyui import install
from tools.comfyui.client import Progress
from tools.comfyui.server import Server
from tools.demo_request import DemoRequest, DemoRow, Render
from tools.workflows.api import LOADERS, missing, of_class, read

WORKFLOW = "text_and_image"
OUTPUT = install.ROOT / "output" / "demo.png"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXTS = ("circle", "triangle", "ring", "square")  # over one reference, and then none
TOLD = ("star", "ring", "circle")  # over each reference, another shape than it shows
MINIATURE = "Miniature models of this repository, trained on images like the references."
QUICK = ("--disable-api-nodes",)  # a second less to start
PATIENCE = 6 * 3600.0  # seconds for an image: real models on a CPU take minutes a step
Workflow = dict[str, Any]


def adjusted(workflow: Workflow, request: DemoRequest, row: DemoRow, render: Render) -> Workflow:
    """Return the workflow with the demo's values in place of its own."""
    prompt = workflows.given(
        workflow,
        EmptyLatentImage={"width": request.size, "height": request.size, "batch_size": 1},
        KSampler={"steps": request.steps, "seed": request.seed, "cfg": request.guidance},
        LoadImage={"image": row.file},
        IPA_Apply={"weight": render.weight},
    )
    positive, negative = _text_inputs(prompt)
    positive["text"], negative["text"] = render.text, request.negative
    return prompt


def texts(workflow: Workflow) -> tuple[str, str]:
    """Return the workflow's positive and negative prompt."""
    positive, negative = _text_inputs(workflow)
    return str(positive["text"]), str(negative["text"])


def _text_inputs(workflow: Workflow) -> list[dict[str, Any]]:
    sampler = next(of_class(workflow, "KSampler"))
    return [workflow[sampler[side][0]]["inputs"] for side in ("positive", "negative")]


def drawn_steps(asked: int) -> int:
    """Return how many steps ComfyUI's ddim_uniform draws when asked for so many.

    It takes every (1000 // asked)-th time of the schedule, from the second on.
    """
    return len(range(1, 1000, max(1, 1000 // asked))) if asked > 0 else 0


def show(render: Render, progress: Progress) -> None:
    """Print one line an image; on a terminal it follows the steps."""
    step, steps = progress.step, progress.total
    if step < steps and not sys.stdout.isatty():
        return
    bar = "█" * round(24 * step / steps)
    end = "\r" if step < steps else "\n"
    what = f"λ = {render.weight:<4g} {render.text[:24]:<24}"
    print(f"  {what} {bar:<24} step {step:>2} of {steps}", end=end, flush=True)


def miniature_request(seed: int, size: int | None, steps: int | None) -> DemoRequest:
    """Ask for three references that training never saw at growing λ, and one with several texts."""
    assemble.ensure()
    opened = {
        name: Image.open(assemble.base_directory() / "input" / name).convert("RGB")
        for name in assemble.REFERENCES
    }
    rows = []
    for shape, (name, image) in zip(TOLD, opened.items(), strict=True):
        text = caption(SHAPES.index(shape))
        renders = tuple(Render(weight, text) for weight in WEIGHTS)
        rows.append(DemoRow(f'"{text}", the image gaining weight', name, image, renders))
    name, image = next(iter(opened.items()))
    captions = [*(caption(SHAPES.index(shape)) for shape in TEXTS), ""]
    renders = tuple(Render(1.0, text) for text in captions)
    rows.append(DemoRow("several texts over one reference, at full weight", name, image, renders))
    return DemoRequest(
        tuple(rows),
        negative="",
        size=size or workflows.SIDE,
        steps=steps or workflows.STEPS,
        guidance=workflows.GUIDANCE,
        seed=seed,
    )


def published_request(
    workflow: Workflow, seed: int, size: int | None, steps: int | None
) -> DemoRequest:
    """Ask for the workflow's own text at the published settings."""
    positive, negative = texts(workflow)
    name = "reference.png"
    renders = tuple(Render(weight, positive) for weight in WEIGHTS)
    title = f'"{positive}", the image gaining weight'
    row = DemoRow(title, name, reference_images.draw(name), renders)
    return DemoRequest((row,), negative, size or 512, steps or 50, 7.5, seed)


def render_with_comfyui(
    comfyui: Path, request: DemoRequest, models: Path | None
) -> list[list[Image.Image]]:
    """Return the images of a ComfyUI server that runs this pack, for each row."""
    workflow = read(WORKFLOW)
    with tempfile.TemporaryDirectory() as folder:
        if models:
            base, arguments = _base_with(models, request, Path(folder))
        else:
            base, arguments = assemble.base_directory(), QUICK
            workflow = workflows.on_miniature(workflow, "")
        print("Starting ComfyUI …", flush=True)
        threads = None if models else 1
        made: list[list[Image.Image]] = []
        with Server(base, comfyui, arguments, prompt_timeout=PATIENCE, threads=threads) as client:
            for row in request.rows:
                print(row.title, flush=True)
                made.append([])
                for render in row.renders:
                    prompt = adjusted(workflow, request, row, render)
                    (images,) = client.run(prompt, partial(show, render)).images.values()
                    made[-1].append(Image.open(io.BytesIO(images[0])))
    return made


def _base_with(models: Path, request: DemoRequest, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return a base directory without models, and ComfyUI's flags that add `models` to it."""
    base = folder / "base"
    (base / "input").mkdir(parents=True)
    for row in request.rows:
        row.reference.save(base / "input" / row.file)
    paths = {"base_path": str(models), "is_default": True}
    paths |= {kind: kind for kind, _ in LOADERS.values()}
    config = folder / "models.yaml"
    config.write_text(json.dumps({"demo": paths}), encoding="utf-8")  # JSON is YAML
    return base, (*QUICK, "--extra-model-paths-config", str(config))


def draw_sheet(
    rows: Sequence[DemoRow], images: Sequence[Sequence[Image.Image]], notes: Sequence[str] = ()
) -> Image.Image:
    """Draw each row's reference, and beside it `images`, one a render; `notes` stand below.

    Under an image stands its weight where that changes, and its text where that does.
    """
    sheet_rows = []
    for row, drawn in zip(rows, images, strict=True):
        if len({render.text for render in row.renders}) > 1:
            captions = [f'"{render.text}"' if render.text else "no text" for render in row.renders]
        else:
            captions = [f"weight {render.weight:g}" for render in row.renders]
        sheet_rows.append(Row(row.title, [row.reference, *drawn], ["reference", *captions]))
    title = "IP-Adapter: an image as a prompt"
    return contact_sheet(sheet_rows, title=title, notes=notes, layout=Layout((216, 216)))


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
    parser.add_argument("--out", type=_path, default=OUTPUT, help="where the sheet is written")
    given = parser.parse_args()
    if given.models and given.no_host:
        parser.error("--models needs ComfyUI; leave --no-host out")
    if given.steps is not None and drawn_steps(given.steps) != given.steps:
        parser.error(
            f"--steps {given.steps}: ComfyUI's ddim_uniform would draw "
            f"{drawn_steps(given.steps)}; take a divisor of 1000, as 10, 20, 25, 40 or 50"
        )
    if given.models and (lacking := missing(read(WORKFLOW), given.models)):
        parser.error(f"{given.models} lacks {', '.join(lacking)}; the README says where it is")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begun = time.monotonic()
    try:
        comfyui = None if given.no_host else install.locate()
    except install.HostMissing as error:
        sys.exit(str(error))
    if comfyui is None and not given.no_host:
        print(f"No ComfyUI found. {install.REMEDY}", flush=True)
        if given.models:
            sys.exit(1)
        print("Until then diffusers draws the same sheet.", flush=True)

    settings = given.seed, given.size, given.steps
    if given.models:
        request, notes = published_request(read(WORKFLOW), *settings), []
    else:
        request, notes = miniature_request(*settings), [MINIATURE]
    if comfyui:
        made = render_with_comfyui(comfyui, request, given.models)
    else:
        from tools import demo_diffusers

        print("Drawing with diffusers …", flush=True)
        made = demo_diffusers.draw(request, show)
        notes.append("Drawn by diffusers from the same files, in place of ComfyUI.")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(request.rows, made, notes).save(given.out)
    print(f"{sum(map(len, made))} images in {time.monotonic() - begun:.0f} s, start included")
    print(given.out)


if __name__ == "__main__":
    main()
