"""The model folders: `ipadapter`, which is this pack's, and the host's `clip_vision`."""

from __future__ import annotations

import os

import folder_paths

from ..ip_adapter_core.files.adapter_file import EXTENSIONS
from ..ip_adapter_core.files.finder import File, Folder

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


def adapters() -> Folder:
    """All adapters, as the host finds them."""
    return _folder(register(), adapter_names())


def encoders() -> Folder:
    """All image encoders, as the host finds them."""
    return _folder(ENCODERS, encoder_names())


def _folder(key: str, names: list[str]) -> Folder:
    known = folder_paths.folder_names_and_paths.get(key, ([], set()))[0]
    paths = ((name, folder_paths.get_full_path(key, name)) for name in names)
    files = (File(name, path) for name, path in paths if path is not None)  # not: a dead link
    return Folder(tuple(known), tuple(files))


def _path(folder: str, name: str, what: str) -> str:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"{what} '{name}' is in none of these folders: {searched}. Put the file into one "
            "of them, then refresh the node list (R)."
        )
    return path
