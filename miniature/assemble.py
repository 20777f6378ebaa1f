"""Lay the miniature's files where ComfyUI looks: a base directory with models and images."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from ip_adapter_core.files.atomic import atomic
from miniature import files, workflows
from miniature.scenes import Scenes, render, scenes, to_pil
from tools import reference_images
from tools.comfyui.install import ROOT

FOLDER_VARIABLE = "IP_ADAPTER_MINIATURE"
SHOWN = 1 << 40  # the stream of what is shown and measured; training never sees it
REFERENCES = {"reference.png": 9, "reference_2.png": 31, "reference_3.png": 44}
"""Scenes of that stream, by the names that the workflows load."""
SIDE = 256  # pixels of a reference as it lies in input/
VERSION = 5  # of what `ensure` makes: another seed of the text encoder raises it too
Write = Callable[[Path], object]


def base_directory() -> Path:
    """Return the build's base directory for ComfyUI; IP_ADAPTER_MINIATURE moves it."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    if files.FOLDER == files.SHIPPED:
        return ROOT / ".cache" / "miniature"
    build = hashlib.sha256(str(files.FOLDER).encode()).hexdigest()[:8]
    return ROOT / ".cache" / f"miniature-{build}"


def ensure() -> Path:
    """Make what is missing or was made of other files; several processes may call it at once."""
    base = base_directory()
    base.mkdir(parents=True, exist_ok=True)
    stamp = base / "made.json"
    shipped = files.manifest()["files"]
    wanted = {"shipped": shipped, "version": VERSION}
    with FileLock(base / "making.lock"):
        if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
            return base
        stamp.unlink(missing_ok=True)  # what follows may be interrupted
        for place, write in {**_models(), **_inputs()}.items():
            (base / place).parent.mkdir(parents=True, exist_ok=True)
            with atomic(base / place) as temporary:
                write(temporary)
        stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return base


def _models() -> dict[str, Write]:
    """Return what writes each model of the build, by its place."""
    here = files.FOLDER
    plain, plus = (workflows.ADAPTERS[kind] for kind in ("base", "fine-grained"))
    made: dict[str, Write] = {
        f"checkpoints/{workflows.CHECKPOINT}": _checkpoint,
        f"clip_vision/{workflows.ENCODER}": partial(shutil.copyfile, here / files.ENCODER),
        f"ipadapter/{plain}": partial(files.with_idle_layer, here / files.ADAPTER),
        f"ipadapter/{plus}": partial(files.with_idle_layer, here / files.ADAPTER_PLUS),
        f"checkpoints/{workflows.SECOND}": partial(_checkpoint, change=files.SECOND_BASE),
        f"controlnet/{workflows.CONTROL}": _control,
    }
    return {f"models/{place}": write for place, write in made.items()}


def _checkpoint(target: Path, change: str | None = None) -> None:
    from miniature.control import merged  # its libraries take longer than what is made already

    unet = files.dequantized(load_file(files.FOLDER / files.UNET))
    if change:
        unet = merged(unet, files.dequantized(load_file(files.FOLDER / change)))
    vae = files.autoencoder(files.FOLDER / files.AUTOENCODER)
    save_file(files.checkpoint(unet, vae), target, metadata={"format": "pt"})


def _control(target: Path) -> None:
    from miniature.control import Control

    control = files.frozen(Control(), files.FOLDER / files.CONTROL)
    save_file(files.halved(control.comfyui()), target, metadata={"format": "pt"})


def _inputs() -> dict[str, Write]:
    """Return what writes each image that the workflows load, by its place."""
    images = {name: shown(scenes(SHOWN, 1, number)) for name, number in REFERENCES.items()}
    images["mask.png"] = reference_images.draw("mask.png")
    return {f"input/{name}": partial(image.save, format="PNG") for name, image in images.items()}


def shown(rows: Scenes, side: int = SIDE) -> Image.Image:
    """Draw the first of the scenes."""
    return to_pil(render(rows[:1], side)[0])
