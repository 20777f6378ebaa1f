"""The model folders: `ipadapter`, which is this pack's, and the host's `clip_vision`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ..ip_adapter_core.checkpoint import EXTENSIONS
from ..ip_adapter_core.image_tower import CONFIG_NAME

FOLDER = "ipadapter"
ENCODERS = "clip_vision"  # the host's own folder


def register() -> str:
    """Make `models/ipadapter` known beside what extra_model_paths.yaml names under that key, and
    return the key. Doing it twice changes nothing."""
    default = os.path.join(folder_paths.models_dir, FOLDER)
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    if default not in paths:
        paths = [*paths, default]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, *EXTENSIONS})
    return FOLDER


def adapter_names() -> list[str]:
    """Files to choose from, as the host lists them."""
    return folder_paths.get_filename_list(register())


def adapter_path(name: str) -> str:
    """Full path of an adapter. Raises FileNotFoundError that names the folders searched."""
    return _path(register(), name, "IP-Adapter")


def encoder_names() -> list[str]:
    """Image encoders to choose from, as the host lists them for its own loader."""
    known = ENCODERS in folder_paths.folder_names_and_paths
    return folder_paths.get_filename_list(ENCODERS) if known else []


def encoder_path(name: str) -> str:
    """Full path of an image encoder. Raises FileNotFoundError that names the folders searched."""
    return _path(ENCODERS, name, "Image encoder")


def configurations(path: str) -> Iterator[str]:
    """The files beside an image encoder that may hold its configuration, those that are there."""
    beside = Path(path)
    for file in (beside.with_suffix(".json"), beside.with_name(CONFIG_NAME)):
        if file.is_file():
            yield str(file)


def _path(folder: str, name: str, what: str) -> str:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"{what} '{name}' is in none of these folders: {searched}. Put the file into one "
            "of them, then refresh the node list (R)."
        )
    return path
