"""Lay the miniature's files where ComfyUI looks: a base directory with models and pictures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from miniature import files, low_rank, text, workflows
from miniature.control import Control
from miniature.scenes import Scenes, render, scenes
from tools import reference_images
from tools.comfyui.install import ROOT

FOLDER_VARIABLE = "IP_ADAPTER_WORLD"
SHOWN = 1 << 40  # the stream of what is shown and measured; training never sees it
REFERENCES = {"reference.png": 9, "reference_2.png": 31, "reference_3.png": 44}
"""Scenes of that stream, by the names that the workflows load."""
SIDE = 256  # pixels of a reference as it lies in input/
_DRAWN = ("mask.png",)


def base_directory() -> Path:
    """ComfyUI's base directory of the miniature; IP_ADAPTER_WORLD moves it. Another build than the
    shipped one has another."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    if files.FOLDER == files.SHIPPED:
        return ROOT / ".cache" / "world"
    build = hashlib.sha256(str(files.FOLDER).encode()).hexdigest()[:8]
    return ROOT / ".cache" / f"world-{build}"


def ensure() -> Path:
    """Make what is missing or was made of other files, and return the base directory. Takes some
    seconds the first time. Safe to call from several processes at once."""
    base = base_directory()
    base.mkdir(parents=True, exist_ok=True)
    stamp = base / "made.json"
    wanted = {"shipped": files.manifest()["files"], "text": text.SEED, "version": 4}
    with FileLock(base / "making.lock"):
        if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
            return base
        stamp.unlink(missing_ok=True)  # what follows may be interrupted
        for place, write in _models().items():
            _write(base / "models" / place, write)
        (base / "models" / "controlnet").mkdir(parents=True, exist_ok=True)
        for name, number in REFERENCES.items():
            _write(base / "input" / name, _picture(scenes(SHOWN, 1, number)))
        for name in _DRAWN:
            _write(base / "input" / name, _drawn(name))
        stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return base


def _models() -> dict[str, Callable[[Path], object]]:
    def checkpoint(change: str | None = None) -> Callable[[Path], object]:
        def write(target: Path) -> None:
            unet = files.dequantised(load_file(files.FOLDER / files.UNET))
            if change:
                unet = low_rank.merged(unet, files.dequantised(load_file(files.FOLDER / change)))
            vae = files.autoencoder(files.FOLDER / files.AUTOENCODER)
            save_file(files.checkpoint(unet, vae), target, metadata={"format": "pt"})

        return write

    def control(target: Path) -> None:
        made = Control()
        state = files.dequantised(load_file(files.FOLDER / files.CONTROL))
        made.load_state_dict({key: x.float() for key, x in state.items()})
        save_file(files.halved(made.comfyui()), target, metadata={"format": "pt"})

    def copy(name: str) -> Callable[[Path], object]:
        return lambda target: shutil.copyfile(files.FOLDER / name, target)

    def adapter(name: str) -> Callable[[Path], object]:
        return lambda target: files.with_idle_layer(files.FOLDER / name, target)

    shipped = files.manifest()["files"]
    further = {
        files.RESTYLED: (
            f"checkpoints/{workflows.SECOND}",
            checkpoint(files.RESTYLED),
        ),
        files.CONTROL: (f"controlnet/{workflows.CONTROL}", control),
    }
    return {
        f"checkpoints/{workflows.CHECKPOINT}": checkpoint(),
        **dict(further[name] for name in further if name in shipped),
        f"clip_vision/{workflows.ENCODER}": copy(files.ENCODER),
        f"ipadapter/{workflows.ADAPTERS['base']}": adapter(files.ADAPTER),
        f"ipadapter/{workflows.ADAPTERS['fine-grained']}": adapter(files.ADAPTER_PLUS),
    }


def picture(rows: Scenes, side: int = SIDE) -> Image.Image:
    """The first of the scenes, drawn."""
    return as_image(render(rows[:1], side)[0])


def as_image(pixels: torch.Tensor) -> Image.Image:
    """`(3, h, w)`, 0 … 1, in 8 bits."""
    return Image.fromarray((pixels.movedim(0, -1) * 255).round().clamp(0, 255).byte().numpy())


def _picture(rows: Scenes) -> Callable[[Path], object]:
    return lambda target: picture(rows).save(target, format="PNG")


def _drawn(name: str) -> Callable[[Path], object]:
    return lambda target: reference_images.draw(name).save(target, format="PNG")


def _write(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside `target` and rename, so that no half-written file bears its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".partial")
    write(unfinished)
    os.replace(unfinished, target)
