"""Stand-in models: the public files' layouts and keys with random weights, for a CPU.

They lie in a ComfyUI base directory under the public names that the workflows ask for, so
workflows run unmodified; nothing but the weights, the UNet's size (one level of 320
channels; SDXL: three, with all 70 cross-attention layers) and the image encoder (CLIP
ViT-L in place of ViT-H and ViT-bigG) differs from the real ones. Untrained: pictures are
soft fields of colour that text, image and λ visibly change, no more.

``python -m tests.support.standins [group or model …]`` makes them and prints where they lie.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file

from tests.support.random_models import State
from tests.support.standin_files import GROUPS, MODELS, PUBLIC_NAMES
from tools import pictures
from tools.comfyui.install import ROOT

__all__ = ["GROUPS", "INPUTS", "MODELS", "PUBLIC_NAMES", "base_directory", "ensure", "path"]
logger = logging.getLogger("comfyui_ip_adapter.tools")

VERSION = 1  # raise it when a file's content changes: files of other versions are made anew
FOLDER_VARIABLE = "IP_ADAPTER_MINIATURE"
INPUTS = tuple(pictures.SCENES)  # what lies in input/


def base_directory() -> Path:
    """The ComfyUI base directory of the stand-ins; IP_ADAPTER_MINIATURE moves it."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else ROOT / ".cache" / "miniature"


def path(name: str) -> Path:
    """Where the stand-in ``name`` (a key of MODELS) lies, made or not."""
    return base_directory() / "models" / MODELS[name].path


def _nested(state: State) -> dict[str, State]:
    """The two-level dict of published ``.bin`` files."""
    nested: dict[str, State] = {}
    for key, tensor in state.items():
        group, _, rest = key.partition(".")
        nested.setdefault(group, {})[rest] = tensor
    return nested


def _write(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``target`` and rename, so that no half-written file bears its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".partial")
    write(unfinished)
    os.replace(unfinished, target)


def _draw(target: Path) -> None:
    picture = pictures.picture(target.name)
    _write(target, lambda unfinished: picture.save(unfinished, format="PNG"))


def _save(target: Path, build: Callable[[], State]) -> None:
    state = build()
    if target.suffix == ".bin":
        _write(target, lambda unfinished: torch.save(_nested(state), unfinished))
    else:
        _write(target, lambda unfinished: save_file(state, unfinished, metadata={"format": "pt"}))


def _link(target: Path, source: Path) -> None:
    """A hard link, or a copy where the file system has none."""

    def link(unfinished: Path) -> None:
        unfinished.unlink(missing_ok=True)
        try:
            os.link(source, unfinished)
        except OSError:
            shutil.copyfile(source, unfinished)

    _write(target, link)


def _selected(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in MODELS and name not in GROUPS:
            known = ", ".join([*GROUPS, *MODELS])
            raise KeyError(f"no stand-in model or group {name!r}; there are: {known}")
    groups = {group for name in names for group in GROUPS.get(name, ())}
    return [name for name, model in MODELS.items() if name in names or model.group in groups]


def ensure(*names: str) -> Path:
    """Make the named models or groups unless they are there, and return the base directory.

    Safe to call from several processes at once; what an interrupted call made is kept.

    Raises:
        KeyError: a name that is neither in MODELS nor in GROUPS.
    """
    selected = _selected(names)
    base = base_directory()
    for folder in ("checkpoints", "clip_vision", "controlnet", "ipadapter"):
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    with FileLock(base / "making.lock"):
        manifest = base / "manifest.json"
        made: dict[str, int] = json.loads(manifest.read_text()) if manifest.exists() else {}

        def make(relative: str, write: Callable[[Path], None]) -> None:
            if made.get(relative) == VERSION and (base / relative).exists():
                return
            logger.info("making the stand-in %s", relative)
            write(base / relative)
            made[relative] = VERSION
            _write(manifest, lambda unfinished: unfinished.write_text(json.dumps(made, indent=1)))

        for name in pictures.SCENES:
            make(f"input/{name}", _draw)
        for name in selected:
            model = MODELS[name]
            make(f"models/{model.path}", partial(_save, build=model.build))
            for alias in model.also:
                make(f"models/{alias}", partial(_link, source=path(name)))
    return base


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(ensure(*(sys.argv[1:] or ["workflows"])))
