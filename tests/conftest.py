"""The host, the pack, stand-in models and a running server, each made once and when asked for.

A test that takes none of these fixtures runs without ComfyUI. Where ComfyUI is missing, the
others skip and say so; with ``CI`` set they fail.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Last, never first: in front, this pack's nodes/ would shadow ComfyUI's nodes.py.
sys.path[:] = [entry for entry in sys.path if entry not in ("", str(ROOT), os.getcwd())]
sys.path.append(str(ROOT))

from tests.support import standins  # noqa: E402
from tools.comfyui import browser  # noqa: E402
from tools.comfyui import install as _host  # noqa: E402
from tools.comfyui.client import Client  # noqa: E402
from tools.comfyui.server import Server  # noqa: E402

_host.load_pack()  # so that test modules can import it by its name; needs no ComfyUI
# Autograd's engine starts here: after a test that compiles it would start threads, for devices that
# tracing makes up, and a process that has them can fork none that trains.
torch.ones((), requires_grad=True).backward()


SHARED = ("page", "miniature_server", "_started")  # one browser, one server of each kind
CPU_SECONDS = 10.0  # what a test of the day set may take


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep in one worker the tests of a module, and those that share a server or a browser."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            shared = [name for name in SHARED if name in getattr(item, "fixturenames", ())]
            item.add_marker(pytest.mark.xdist_group(shared[0] if shared else item.path.stem))


def _cpu_seconds() -> float:
    """Return what this process, and the children that it has waited for, have used."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test of the day set that is too slow for it."""
    begun = _cpu_seconds()
    try:
        yield
    except RuntimeError as error:  # host.py's word for hosts before 0.19
        if "knows no curves" in str(error):
            pytest.skip(str(error))
        raise
    used = _cpu_seconds() - begun
    if used > CPU_SECONDS and item.get_closest_marker("nightly") is None:
        pytest.fail(
            f"took {used:.1f} s of CPU time; a test of the day set takes at most "
            f"{CPU_SECONDS:.0f}: make it smaller, or mark it `nightly` beside a smaller one",
            pytrace=False,
        )


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
    _register(standins.base_directory())
    return host_path


@pytest.fixture(scope="session")
def pack(host: Path) -> ModuleType:
    """This pack, with the host that its nodes import: the module ``comfyui_ip_adapter``."""
    return _host.load_pack()


def _register(base: Path) -> None:
    """Let a booted host's loaders find the stand-ins by name, whichever came first."""
    folder_paths = sys.modules.get("folder_paths")
    if folder_paths and (base / "models").is_dir():
        for folder in sorted((base / "models").iterdir()):
            folder_paths.add_model_folder_path(folder.name, str(folder), is_default=True)


def _made(*names: str) -> Path:
    base = standins.ensure(*names)
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
def _started(host_path: Path, models: Path) -> Iterator[tuple[Server, Client]]:
    flags = _host.flags()
    chosen = any(flag.startswith("--cache-") or flag == "--high-ram" for flag in flags)
    # The host's default cache drops results where memory is short; which ones, no test can know.
    server = Server(models, host_path, () if chosen else ("--cache-classic",))
    with server as client:
        yield server, client


@pytest.fixture(scope="session")
def server(_started: tuple[Server, Client]) -> Client:
    """A client of a ComfyUI server that runs on ``models`` with this pack."""
    return _started[1]


@pytest.fixture(scope="session")
def server_id(_started: tuple[Server, Client]) -> int:
    """The number of that server's process."""
    process = _started[0].process
    assert process is not None
    return process.pid


@pytest.fixture(scope="session")
def miniature_server(host_path: Path) -> Iterator[Client]:
    """A client of a ComfyUI server that runs on the miniature with this pack."""
    from miniature import assemble

    with Server(assemble.ensure(), host_path, ("--cache-classic",)) as client:
        yield client


@pytest.fixture(scope="session")
def small(pack: ModuleType) -> ModuleType:
    """Random models of few channels, and sampling with them."""
    from tests.sampling import small

    return small


@pytest.fixture(scope="session")
def flux(pack: ModuleType) -> ModuleType:
    """Random Flux models of small width, the same in diffusers, and adapters for them."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import FLUX_HOOKS

    from tests.sampling import flux

    if not FLUX_HOOKS:
        pytest.skip("this ComfyUI does not open Flux's blocks (0.17 does)")
    return flux


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> None:
    """Keep what lives already out of later garbage collections.

    ComfyUI collects at every sampling run whose model another patcher has held before, which is
    each one here: over the heap of all libraries that takes a second, over a test's own objects
    none.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers as small as most tests' take far longer when two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arrow(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of training pictures go to a folder of the tests."""
    import datasets

    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


@pytest.fixture
def accelerate_anew() -> Iterator[Callable[[], None]]:
    """accelerate keeps its state in classes: one run after the other in one process needs this."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    reset()
    yield reset
    reset()


@pytest.fixture(scope="module")
def page(client: Client) -> Iterator[Any]:
    """The editor of the server that the test's folder has, see `tools.comfyui.browser.editor`."""
    if browser.chromium() is None:
        pytest.skip("no browser: install chromium, or name one in CHROMIUM_PATH")
    pytest.importorskip("playwright.sync_api", reason="`pip install playwright`")
    with browser.editor(client, viewport={"width": 1600, "height": 900}) as page:
        yield page
