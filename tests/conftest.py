"""The host, the pack, stand-in models and a running server, each made once and when asked for.

A test that takes none of these fixtures runs without ComfyUI. Where ComfyUI is missing, the
others skip and say so; with ``CI`` set they fail.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Last, never first: in front, this pack's nodes/ would shadow ComfyUI's nodes.py.
sys.path[:] = [entry for entry in sys.path if entry not in ("", str(ROOT), os.getcwd())]
sys.path.append(str(ROOT))

from tools import host as _host  # noqa: E402
from tools import miniature  # noqa: E402
from tools.server import Client, Server  # noqa: E402

_host.load_pack()  # so that test modules can import it by its name; needs no ComfyUI


@pytest.fixture(scope="session")
def host_path() -> Path:
    """The folder of ComfyUI."""
    try:
        found, reason = _host.locate(), "no ComfyUI found"
    except _host.HostMissing as error:
        found, reason = None, str(error)
    if found is not None:
        return found
    message = f"{reason}; set {_host.PATH_VARIABLE} to the folder that holds its main.py"
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session")
def host(host_path: Path) -> Path:
    """ComfyUI, booted in this process: ``comfy``, ``nodes`` and so on can be imported."""
    _host.boot(host_path)
    _register(miniature.base_directory())
    return host_path


@pytest.fixture(scope="session")
def pack(host: Path) -> ModuleType:
    """This pack, with the host that its nodes import: the module ``comfyui_ip_adapter``."""
    return _host.load_pack()


def _register(base: Path) -> None:
    """Let a booted host's loaders find the stand-ins by name, whichever came first."""
    if "folder_paths" in sys.modules and (base / "models").is_dir():
        _host.add_models(base)


def _made(*names: str) -> Path:
    base = miniature.ensure(*names)
    _register(base)
    return base


@pytest.fixture(scope="session")
def models() -> Path:
    """Base directory with the SD1.5 stand-ins, ControlNet included, and pictures in input/."""
    return _made("sd15", "control")


@pytest.fixture(scope="session")
def models_sdxl() -> Path:
    """The same base directory, with the SDXL stand-ins too."""
    return _made("sd15", "sdxl")


@pytest.fixture(scope="session")
def server(host_path: Path, models: Path) -> Iterator[Client]:
    """A client of a ComfyUI server that runs on ``models`` with this pack."""
    with Server(models, host_path) as client:
        yield client
