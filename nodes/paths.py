"""Find the folders of models and of image prompts, and the files in them.

`ipadapter` and `image_prompts` are this pack's, `clip_vision` is ComfyUI's own.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ..ip_adapter_core.comfyui.host import is_within
from ..ip_adapter_core.face_encoder import missing
from ..ip_adapter_core.files.adapter_file import EXTENSIONS
from ..ip_adapter_core.files.finder import File, Folder
from ..ip_adapter_core.prompt_file import SUFFIX

logger = logging.getLogger("comfyui_ip_adapter")
ADAPTERS = "ipadapter"
ENCODERS = "clip_vision"  # ComfyUI's own folder
IMAGE_PROMPTS = "image_prompts"
FACES = "insightface"  # where insightface and other packs look for its model packs, too
_OF_FLUX_PACKS = {  # key of the folder, and where it lies below the models
    "xlabs_ipadapters": os.path.join("xlabs", "ipadapters"),  # x-flux-comfyui
    "ipadapter-flux": "ipadapter-flux",  # ComfyUI-IPAdapter-Flux
}
_LEFT_OUT: set[str] = set()


def register() -> str:
    """Make `models/ipadapter` known to ComfyUI, and return its key.

    It stands beside what extra_model_paths.yaml names under that key, and before the folders of
    other packs' adapters for Flux, where there are some. Doing it twice changes nothing.
    """
    known = folder_paths.folder_names_and_paths
    paths, extensions = known.get(ADAPTERS, ([], set()))
    more = [os.path.join(folder_paths.models_dir, ADAPTERS)]
    for key, place in _OF_FLUX_PACKS.items():
        folders = [os.path.join(folder_paths.models_dir, place), *known.get(key, ([],))[0]]
        more += [folder for folder in folders if os.path.isdir(folder)]
    paths = [*dict.fromkeys([*paths, *more])]
    folder_paths.folder_names_and_paths[ADAPTERS] = (paths, {*extensions, *EXTENSIONS})
    return ADAPTERS


def adapter_names() -> list[str]:
    """Files to choose from, as ComfyUI lists them."""
    return _printable(folder_paths.get_filename_list(register()))


def adapter_path(name: str) -> str:
    """Full path of an adapter. Raises FileNotFoundError that names the folders searched."""
    return _path(register(), name, "IP-Adapter")


def encoder_names() -> list[str]:
    """Image encoders to choose from, as ComfyUI lists them for its own loader."""
    known = ENCODERS in folder_paths.folder_names_and_paths
    return _printable(folder_paths.get_filename_list(ENCODERS)) if known else []


def face_encoders() -> dict[str, Path]:
    """Return the model packs of insightface that are whole, by their names."""
    default = os.path.join(folder_paths.models_dir, FACES)
    known, extensions = folder_paths.folder_names_and_paths.get(FACES, ([], set()))
    if default not in known:
        folder_paths.folder_names_and_paths[FACES] = ([*known, default], extensions)
    found: dict[str, Path] = {}
    for base in folder_paths.folder_names_and_paths[FACES][0]:
        for folder in (Path(base, "models"), Path(base)):
            for pack in sorted(folder.iterdir()) if folder.is_dir() else ():
                if pack.is_dir() and not missing(pack):
                    found.setdefault(pack.name, pack)
    return {name: found[name] for name in _printable(found)}


def face_encoder_path(name: str) -> Path:
    """Return a model pack's folder. Raises FileNotFoundError that says where it is to be."""
    found = face_encoders()
    if name not in found:
        place = os.path.join(folder_paths.models_dir, FACES, "models", name or "buffalo_l")
        raise FileNotFoundError(
            f"The face encoder '{name}' is not there. Put the files of insightface's model pack "
            f"(det_10g.onnx and w600k_r50.onnx of buffalo_l) into {place}, then refresh the node "
            "list (R)."
        )
    return found[name]


def _printable(names: Iterable[str]) -> list[str]:
    """Leave out names that are no text in UTF-8, as archives of other systems bring them.

    Neither a message nor a saved workflow could hold one.
    """
    kept = []
    for name in names:
        shown = name.encode("utf-8", "backslashreplace").decode()
        if shown == name:
            kept.append(name)
        elif name not in _LEFT_OUT:
            _LEFT_OUT.add(name)
            logger.warning("'%s' is left out: its name is no UTF-8. Rename the file.", shown)
    return kept


def encoder_path(name: str) -> str:
    """Full path of an image encoder. Raises FileNotFoundError that names the folders searched."""
    return _path(ENCODERS, name, "Image encoder")


def adapters() -> Folder:
    """All adapters, as ComfyUI finds them."""
    return _folder(register(), adapter_names())


def encoders() -> Folder:
    """All image encoders, as ComfyUI finds them."""
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


class Target(NamedTuple):
    """Where a new file goes: its path, and how ComfyUI names it to its editor."""

    path: str
    filename: str
    subfolder: str


def prompt_names() -> list[str]:
    """List the files to choose from, named as ComfyUI's own loaders name them.

    Below the input folder as it is, below the output folder with " [output]" behind; those of the
    models folder alone.
    """
    found = []
    for base, behind in (
        (folder_paths.get_output_directory(), " [output]"),
        (folder_paths.get_input_directory(), ""),
    ):
        for relative in folder_paths.recursive_search(os.path.join(base, IMAGE_PROMPTS))[0]:
            name = f"{IMAGE_PROMPTS}/{relative.replace(os.sep, '/')}"
            if _inside(base, name) is not None:
                found.append(name + behind)
    if IMAGE_PROMPTS in folder_paths.folder_names_and_paths:
        found += folder_paths.get_filename_list(IMAGE_PROMPTS)
    found = [name for name in found if name.removesuffix(" [output]").endswith(SUFFIX)]
    return sorted({*_printable(found)})


def prompt_path(name: object) -> str:
    """Full path of a prompt that `prompt_names` lists, or of another in the same folders.

    Links inside models/image_prompts are followed, as ComfyUI follows those of all models; in the
    other two they may not lead out. Raises ValueError for a name that leads out of the folders,
    FileNotFoundError where no such file is.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"Found {name!r} for the image prompt's file; expected a name.")
    given, base = folder_paths.annotated_filepath(name)
    if base == folder_paths.get_temp_directory():
        raise ValueError(f"Image prompt {name!r}: expected [output], [input] or nothing behind.")
    relative = _parts(given, f"Image prompt {name!r}")
    if not relative.endswith(SUFFIX):
        raise ValueError(f"Image prompt {name!r} does not end in {SUFFIX}. Choose another file.")
    path = None
    # First: `prompt_names` lists those of the models folder without anything that tells them apart.
    if base is None and IMAGE_PROMPTS in folder_paths.folder_names_and_paths:
        path = folder_paths.get_full_path(IMAGE_PROMPTS, relative)
    if path is None:
        path = _inside(base or folder_paths.get_input_directory(), relative)
    if path is None:
        raise FileNotFoundError(
            f"Image prompt {name!r} is in none of these folders: {', '.join(_searched())}. Save "
            "it again, or put the file into one of them, then refresh the node list (R)."
        )
    return path


def checked_prefix(filename_prefix: str) -> str:
    """Return the prefix, with forward slashes.

    Raises ValueError for one that leads out of the output folder, by its text or over a link.
    """
    what = f"filename_prefix {filename_prefix!r}"
    prefix = _parts(filename_prefix, what)
    output = folder_paths.get_output_directory()
    if not is_within(output, os.path.join(output, os.path.dirname(prefix))):
        raise ValueError(f"{what} leads out of the output folder, {output}. Choose another.")
    return prefix


def targets(filename_prefix: str) -> Iterator[Target]:
    """Yield new files below the output folder, numbered as ComfyUI numbers its own.

    The next one, and without end those to take where others have taken it meanwhile. Raises
    ValueError for a prefix that `checked_prefix` refuses, or that no folder can be made for.
    """
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            checked_prefix(filename_prefix), folder_paths.get_output_directory()
        )
    except OSError as error:
        raise ValueError(
            f"filename_prefix {filename_prefix!r}: the folder cannot be made or read "
            f"({error.strerror}). Choose another."
        ) from error
    for number in itertools.count(counter):
        filename = f"{name}_{number:05}_{SUFFIX}"
        yield Target(os.path.join(folder, filename), filename, subfolder)


def _parts(name: str, what: str) -> str:
    """Return a relative path with forward slashes that goes down only, on every system."""
    parts = name.replace("\\", "/").split("/")
    # On Windows a colon is a drive or a stream of a file, and dots and blanks at an end fall away.
    if any(not part.strip(" .") or set(part) & {":", "\0"} for part in parts):
        raise ValueError(
            f"{what} is no place inside ComfyUI's folders: expected names of folders and a file, "
            "separated by '/', as in image_prompts/prompt; not empty, absolute, or with '..' "
            "or ':'."
        )
    return "/".join(parts)


def _inside(base: str, relative: str) -> str | None:
    path = os.path.join(base, *relative.split("/"))
    # Links that lead out of the folder are followed before that is decided.
    if not is_within(base, path) or not os.path.isfile(path):
        return None
    return path


def _searched() -> list[str]:
    bases = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    searched = [str(Path(base) / IMAGE_PROMPTS) for base in bases]
    if IMAGE_PROMPTS in folder_paths.folder_names_and_paths:
        searched += folder_paths.get_folder_paths(IMAGE_PROMPTS)
    return searched
