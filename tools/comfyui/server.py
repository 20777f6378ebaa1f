"""A real ComfyUI server with this pack, started for as long as a `with` block lasts."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.comfyui.client import Client
from tools.comfyui.install import PACK, ROOT, flags

logger = logging.getLogger("comfyui_ip_adapter.tools")

WATCHED = """
import os, runpy, sys, threading

def end_with_parent():
    while os.read(0, 4096):  # not sys.stdin: its lock would stand in the way of a normal end
        pass
    os._exit(1)

del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Run a script (`python -c WATCHED main.py …`) that ends when its parent does: the parent keeps
standard input open, and whichever way it goes, the pipe closes. So no server is left behind."""


class ServerError(RuntimeError):
    """Say that the server did not start or ended early, with the end of its log."""


def link_pack(base_directory: Path) -> None:
    """Link this repository into `base_directory/custom_nodes`."""
    link = base_directory / "custom_nodes" / PACK
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.resolve() != ROOT:
        link.unlink()
    if not link.exists():
        try:
            link.symlink_to(ROOT, target_is_directory=True)
        except FileExistsError:
            pass  # another process was quicker
        except OSError:  # Windows without the privilege to make symbolic links
            subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True)


@dataclass
class Server:
    """Run ComfyUI as a subprocess, with this pack and the models and inputs of a base directory.

    What it writes (outputs, temporary files, settings) goes to a folder of its own, which
    ends with it; so servers may share a base directory. `with Server(base, host) as client`.

    Args:
        base_directory: holds `models/` and `input/`.
        host: ComfyUI's folder.
        arguments: further flags for ComfyUI.
        start_timeout: in seconds.
        prompt_timeout: in seconds.
        threads: CPU threads of the computation where `OMP_NUM_THREADS` is not set. Layers of
            small models wait for each other with more than one, above all beside another busy
            process. None leaves the choice to torch.
    """

    base_directory: Path
    host: Path
    arguments: tuple[str, ...] = ()
    start_timeout: float = 180.0
    prompt_timeout: float = 600.0
    threads: int | None = 1
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __enter__(self) -> Client:
        """Start the server and wait until it answers.

        Raises:
            ServerError: it ended, or did not answer within `start_timeout` seconds.
        """
        link_pack(self.base_directory)
        self._folder = tempfile.TemporaryDirectory(prefix="ip-adapter-", ignore_cleanup_errors=True)
        run = Path(self._folder.name)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]  # nothing listens on it from here on
        # Not the environment's: PYTHONPATH may hold the repository, whose nodes/ would shadow.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if self.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        log = run / "log.txt"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self._command(port, run),
                cwd=run,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        address = f"127.0.0.1:{port}"
        try:
            self._wait(self.process, address, log)
        except BaseException:
            self.__exit__()
            raise
        logger.info("ComfyUI answers at http://%s", address)
        return Client(address, timeout=self.prompt_timeout)

    def _command(self, port: int, run: Path) -> list[str]:
        folders: list[str] = []
        for name in ("output", "temp", "user"):
            (run / name).mkdir()
            folders += [f"--{name}-directory", str(run / name)]
        return [
            sys.executable,
            *("-c", WATCHED),
            str(self.host / "main.py"),
            *flags(),
            "--disable-auto-launch",
            *("--port", str(port)),
            *("--base-directory", str(self.base_directory)),
            *folders,
            *("--database-url", "sqlite:///:memory:"),
            *self.arguments,
        ]

    def _wait(self, process: subprocess.Popen[bytes], address: str, log: Path) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                problem = f"ended with exit code {process.returncode}"
                break
            try:
                Client(address, timeout=5).get("/system_stats")
                return
            except OSError:  # urllib's errors included
                time.sleep(0.2)
        else:
            problem = f"did not answer at {address} within {self.start_timeout:g} s"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        end = "\n".join(["The end of its log:", *lines[-40:]])
        raise ServerError(f"ComfyUI {problem}.\n{end}")

    def __exit__(self, *_: object) -> None:
        """End the server, by force if it does not go within ten seconds."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None
        self._folder.cleanup()
