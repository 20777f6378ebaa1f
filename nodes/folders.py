"""The `ipadapter` model folder."""

from __future__ import annotations

import os

import folder_paths

from ..ip_adapter_core.checkpoint import EXTENSIONS

FOLDER = "ipadapter"


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
    path = folder_paths.get_full_path(register(), name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise FileNotFoundError(
            f"IP-Adapter '{name}' is in none of these folders: {searched}. Put the file into one "
            "of them, then refresh the node list (R)."
        )
    return path
