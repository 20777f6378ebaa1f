"""``nox -s demo``: one contact sheet, from the reference at λ = 0 to λ = 1, as output/demo.png.

python -m tools.demo [--models DIR] [--no-host] [--size 192] [--steps 8] [--seed 42]

Starts a real ComfyUI with this pack and posts workflows/api/text_and_image.json for each λ,
on the stand-in models; ``--models`` names a folder of real ones, as ComfyUI/models is one
(``checkpoints/``, ``clip_vision/``, ``ipadapter/`` with the public file names), to use instead.
Without a ComfyUI, or with ``--no-host``, diffusers draws the same sheet through the same core.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tools import host, miniature
from tools.ask import Ask
from tools.sheet import contact_sheet

WORKFLOW = host.ROOT / "workflows" / "api" / "text_and_image.json"
OUTPUT = host.ROOT / "output" / "demo.png"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
REFERENCE = "reference.png"
UNTRAINED = (
    "Untrained stand-in weights: what the pictures show means nothing; "
    "that they change as the reference gains weight is the point."
)
PATIENCE = 6 * 3600.0  # seconds for a picture: real models on a CPU take minutes a step
LOADERS = {  # folder and input that names a file in it
    "CheckpointLoaderSimple": ("checkpoints", "ckpt_name"),
    "CLIPVisionLoader": ("clip_vision", "clip_name"),
    "IPA_LoadAdapter": ("ipadapter", "adapter_name"),
}
Pictures = list[tuple[float, Image.Image]]


def of_class(prompt: dict[str, Any], node_class: str) -> Iterator[dict[str, Any]]:
    """The inputs of every node of that class."""
    for node in prompt.values():
        if node["class_type"] == node_class:
            yield node["inputs"]


def adjusted(workflow: dict[str, Any], ask: Ask, weight: float) -> dict[str, Any]:
    """The workflow with the demo's values in place of its own."""
    prompt = json.loads(json.dumps(workflow))
    values: dict[str, dict[str, Any]] = {
        "EmptyLatentImage": {"width": ask.size, "height": ask.size, "batch_size": 1},
        "KSampler": {"steps": ask.steps, "seed": ask.seed, "cfg": ask.guidance},
        "LoadImage": {"image": REFERENCE},
        "IPA_Apply": {"weight": weight},
    }
    for node_class, inputs in values.items():
        for found in of_class(prompt, node_class):
            found.update(inputs)
    return dict(prompt)


def texts(workflow: dict[str, Any]) -> tuple[str, str]:
    """The workflow's positive and negative prompt."""
    sampler = next(of_class(workflow, "KSampler"))
    positive, negative = (workflow[sampler[side][0]]["inputs"] for side in ("positive", "negative"))
    return str(positive["text"]), str(negative["text"])


def missing(workflow: dict[str, Any], models: Path) -> list[str]:
    """Files that the workflow loads and that ``models`` lacks, relative to it."""
    named = [
        Path(folder, inputs[key])
        for loader, (folder, key) in LOADERS.items()
        for inputs in of_class(workflow, loader)
    ]
    return [str(path) for path in named if not (models / path).is_file()]


def show(weight: float, step: int, steps: int) -> None:
    """One line a step; on a terminal, one line a picture."""
    bar = "█" * round(24 * step / steps)
    live = sys.stdout.isatty()
    end = "\r" if live and step < steps else "\n"
    print(f"  λ = {weight:<4g} {bar:<24} step {step:>2} of {steps}", end=end, flush=True)


def with_host(comfyui: Path, ask: Ask, models: Path | None) -> Pictures:
    """Pictures of a ComfyUI server that runs this pack."""
    from tools.server import Progress, Server

    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    made: Pictures = []
    with tempfile.TemporaryDirectory() as folder:
        base, arguments = (
            _only(models, ask.reference, Path(folder)) if models else (miniature.ensure("sd15"), ())
        )
        print("Starting ComfyUI …", flush=True)
        with Server(base, comfyui, arguments, prompt_timeout=PATIENCE) as client:
            print("Encoding text and image …", flush=True)
            for weight in ask.weights:

                def on_progress(progress: Progress, weight: float = weight) -> None:
                    show(weight, progress.step, progress.total)

                result = client.run(adjusted(workflow, ask, weight), on_progress)
                (images,) = result.images.values()
                made.append((weight, Image.open(io.BytesIO(images[0]))))
    return made


def _only(models: Path, reference: Image.Image, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A base directory without stand-ins, and ComfyUI's flags that add ``models`` to it."""
    base = folder / "base"
    (base / "input").mkdir(parents=True)
    reference.save(base / "input" / REFERENCE)
    paths = {"base_path": str(models), "is_default": True}
    paths |= {name: name for name, _ in LOADERS.values()}
    config = folder / "models.yaml"
    config.write_text(json.dumps({"demo": paths}), encoding="utf-8")  # JSON is YAML
    return base, ("--extra-model-paths-config", str(config))


def without_host(ask: Ask) -> Pictures:
    """The same pictures from diffusers, through the same core."""
    miniature.ensure("sd15")
    from tools import demo_diffusers

    print("Drawing with diffusers …", flush=True)
    return demo_diffusers.pictures(ask, show)


def _folder(name: str) -> Path:
    return Path(name).expanduser().resolve()


def main() -> None:
    """Draw the sheet, and print its path as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=_folder, help="folder of real models to use")
    parser.add_argument("--no-host", action="store_true", help="use diffusers, not ComfyUI")
    parser.add_argument("--size", type=int, help="side in pixels (192; real models: 512)")
    parser.add_argument("--steps", type=int, help="sampling steps (8; real models: 50)")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    if given.models and given.no_host:
        parser.error("--models needs ComfyUI; leave --no-host out")
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

    base = miniature.ensure()
    positive, negative = texts(workflow)
    ask = Ask(
        reference=Image.open(base / "input" / REFERENCE),
        prompt=positive,
        negative=negative,
        weights=WEIGHTS,
        size=given.size or (512 if given.models else 192),
        steps=given.steps or (50 if given.models else 8),
        guidance=7.5,
        seed=given.seed,
    )
    made = with_host(comfyui, ask, given.models) if comfyui else without_host(ask)
    notes = [] if given.models else [UNTRAINED]
    if not comfyui:
        notes.append("Drawn by diffusers through the same core, in place of ComfyUI.")
    OUTPUT.parent.mkdir(exist_ok=True)
    contact_sheet(ask.reference, made, positive, notes).save(OUTPUT)
    print(OUTPUT)


if __name__ == "__main__":
    main()
