"""Find ComfyUI, install it, boot it in this process, and load this pack into it.

Looked for in this order: `COMFYUI_PATH`; the install that the pack lies in
(`ComfyUI/custom_nodes/<pack>`); comfy-cli's workspaces. Finding needs the standard
library only, so that `noxfile.py` can ask before anything is installed:
`python -m tools.comfyui.install` prints the path, `--install` installs one where there is none.
"""

from __future__ import annotations

import argparse
import configparser
import importlib
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

logger = logging.getLogger("comfyui_ip_adapter.tools")

ROOT = Path(__file__).resolve().parents[2]
PACK = "comfyui_ip_adapter"
PATH_VARIABLE = "COMFYUI_PATH"
FLAGS_VARIABLE = "IP_ADAPTER_HOST_FLAGS"
# On a CPU, PyTorch's attention (what GPUs use anyway) halves the time of a step.
DEFAULT_FLAGS = "--cpu --use-pytorch-cross-attention"
TESTED_VERSION = "0.33.0"
_MARKERS = ("main.py", "nodes.py", "folder_paths.py", "comfy")
REMEDY = (
    f"Install ComfyUI by hand (clone its repository anywhere) and set {PATH_VARIABLE} to the "
    "folder that holds its main.py."
)


class HostMissing(RuntimeError):
    """Say that there is no usable ComfyUI; the message says what was looked at and what to do."""


def is_comfyui(path: Path) -> bool:
    """Return whether `path` is the root of a ComfyUI source tree."""
    return all((path / marker).exists() for marker in _MARKERS)


def _around() -> Path | None:
    """Return the install that the pack lies in; a linked pack counts where its link is."""
    for root in (ROOT, Path(os.path.abspath(__file__)).parents[2]):
        if root.parent.name == "custom_nodes" and is_comfyui(root.parents[1]):
            return root.parents[1]
    return None


def default_workspace() -> Path:
    """Return where comfy-cli installs when nobody says otherwise (its constants.py)."""
    documents = () if sys.platform.startswith("linux") else ("Documents",)
    return Path.home().joinpath(*documents, "comfy", "ComfyUI")


def _workspaces() -> Iterator[Path]:
    """Yield comfy-cli's candidates in its own order: configured, recent, default."""
    folder = {
        "win32": ("AppData", "Local"),
        "darwin": ("Library", "Application Support"),
    }.get(sys.platform, (".config",))
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(Path.home().joinpath(*folder, "comfy-cli", "config.ini"), encoding="utf-8")
    except configparser.Error as error:
        logger.warning("comfy-cli's config.ini is not readable, so it is left aside: %s", error)
    for key in ("default_workspace", "recent_workspace"):
        if value := config.defaults().get(key):
            yield Path(value).expanduser()
    yield default_workspace()


def locate() -> Path | None:
    """Return the ComfyUI to use, or None where there is none.

    Raises:
        HostMissing: `COMFYUI_PATH` is set, but is no ComfyUI.
    """
    if value := os.environ.get(PATH_VARIABLE):
        path = Path(value).expanduser().absolute()
        if is_comfyui(path):
            return path
        missing = [marker for marker in _MARKERS if not (path / marker).exists()]
        raise HostMissing(
            f"{PATH_VARIABLE} is {value!r}, which is no ComfyUI: expected a folder with "
            f"{', '.join(_MARKERS)}, did not find {', '.join(missing)}. "
            f"Correct {PATH_VARIABLE}, or unset it to have ComfyUI looked for elsewhere."
        )
    return _around() or next(filter(is_comfyui, _workspaces()), None)


def install() -> Path:
    """Install ComfyUI with comfy-cli into its default workspace and return that.

    Raises:
        HostMissing: comfy-cli is not installed, or failed (its output stands above).
    """
    target = default_workspace()
    if importlib.util.find_spec("comfy_cli") is None:
        raise HostMissing(f"No ComfyUI found, nor comfy-cli to install one with. {REMEDY}")
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--workspace", str(target)]
    command += ["install", "--version", TESTED_VERSION, "--cpu"]
    logger.info("installing ComfyUI %s into %s", TESTED_VERSION, target)
    code = _shown(command)
    if code or not is_comfyui(target):
        raise HostMissing(
            f"comfy-cli could not install ComfyUI into {target} (exit code {code}, its output "
            f"stands above). {REMEDY}"
        )
    return target


def _shown(command: list[str]) -> int:
    """Run a command, pass its output on to stderr without framed tracebacks; its exit code."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            if not line.startswith(("│", "╭", "╰", "{")):
                sys.stderr.write(line)
    return process.returncode


def require() -> Path:
    """Return the ComfyUI to use, installed if need be; HostMissing where none can be had."""
    return locate() or install()


def flags() -> list[str]:
    """Return ComfyUI's flags for where and how to compute; IP_ADAPTER_HOST_FLAGS replaces them."""
    return shlex.split(os.environ.get(FLAGS_VARIABLE, DEFAULT_FLAGS))


def boot(host: Path) -> None:
    """Make `comfy`, `nodes`, `folder_paths` … of `host` importable in this process.

    The host comes first on `sys.path` and the pack last, so that the pack's `nodes`
    package never shadows the host's `nodes.py`. Booting twice is harmless.

    Raises:
        RuntimeError: another module already goes by a name of the host's.
    """
    wanted = ("comfy", "nodes", "folder_paths")
    for name in wanted:
        module = sys.modules.get(name)
        origin = str(getattr(module, "__file__", None) or host)
        if module is not None and not Path(origin).resolve().is_relative_to(host.resolve()):
            raise RuntimeError(
                f"cannot boot ComfyUI from {host}: a module {name!r} is already loaded from "
                f"{origin}. Start a new process in which nothing imports it before the host."
            )
    moved = {"", str(ROOT), os.getcwd(), str(host)}
    sys.path[:] = [str(host), *(path for path in sys.path if path not in moved), str(ROOT)]
    with patch.object(sys, "argv", ["main.py", *flags(), "--disable-all-custom-nodes"]):
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    importlib.import_module("utils.extra_config")  # before `nodes`, which hides that `utils`
    for name in wanted:
        importlib.import_module(name)


def load_pack() -> ModuleType:
    """Load this pack by file, as the host does it, under the one name `comfyui_ip_adapter`.

    Afterwards `from comfyui_ip_adapter.ip_adapter_core.resampler import Resampler` works.
    Needs no host: the pack's root imports nothing.
    """
    return load_package(PACK, ROOT)


def load_package(name: str, folder: Path) -> ModuleType:
    """Load the package in `folder` under that name, once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--install", action="store_true", help="install one where there is none")
    arguments = parser.parse_args()
    try:
        found = require() if arguments.install else locate()
    except HostMissing as error:
        sys.exit(str(error))
    print(found or "")
