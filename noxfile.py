"""Everything there is to run; each session makes what it needs.

`nox -l` lists the sessions; arguments after -- go to what a session runs. All but lint share one
environment. It sees the packages of the Python that runs nox, so that an installed torch is used as
it is, and holds what ComfyUI's requirements.txt and this project ask for besides.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
OF_PACKS = (  # what other packs import
    *("gguf", "PyWavelets", "opencv-python-headless", "scikit-image", "piexif", "webcolors"),
    *("cachetools", "playwright"),
)
LINTERS = ("ruff==0.17.6", "mypy==2.4.1")  # a new release's new rules are taken up on purpose
CODE = ("ip_adapter_core", "nodes", "training", "miniature", "tools", "benchmarks")
KEPT = ("torch", "torchvision", "torchaudio")  # an installed one is never replaced
# Where none is installed: the newest torchaudio (2.11, CUDA 13.0) refuses to be imported beside
# torch 2.15 (CUDA 13.2), and ComfyUI imports it at its start.
TORCH = "torch<2.15"
VERSIONS = """
import importlib.metadata as metadata, json, sys
found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))
"""

nox.needs_version = ">=2025.10.14"
nox.options.sessions = ["lint", "tests"]
nox.options.reuse_venv = "yes"


def extra(name: str) -> Iterator[str]:
    """Give the requirements of one of pyproject's extras, with those that it includes."""
    for requirement in PROJECT["optional-dependencies"][name]:
        inner = requirement.removeprefix(PROJECT["name"])
        if inner.startswith("["):
            yield from extra(inner.strip("[]"))
        else:
            yield requirement


def python_of(folder: Path) -> str:
    """Return the interpreter of the virtual environment in `folder`."""
    scripts = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return str(folder.joinpath(*scripts))


def see_outer_packages(environment: Path) -> None:
    """Let the environment see nox's own packages too, where nox runs in an environment itself."""
    if sys.prefix != sys.base_prefix:
        inner = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
        outer = sysconfig.get_path("purelib") + "\n"
        (inner / "outer.pth").write_text(outer, encoding="utf-8")


def host_folder(session: nox.Session, python: str) -> Path | None:
    """ComfyUI's folder, or None; fails where COMFYUI_PATH names none."""
    found = session.run(
        python, "-m", "tools.comfyui.install", external=True, silent=True, log=False
    )
    return Path(str(found).strip()) if str(found).strip() else None


@nox.session(venv_params=["--system-site-packages"], default=False)
def environment(session: nox.Session) -> None:
    """Make the environment of demo, tests and bench; touched only when a requirement changes."""
    folder = Path(session.virtualenv.location)
    python = python_of(folder)
    see_outer_packages(folder)
    versions = session.run(python, "-c", VERSIONS, *KEPT, silent=True, log=False)
    kept: dict[str, str] = json.loads(str(versions))
    constraints = folder / "constraints.txt"
    fixed = [f"{name}=={version}" for name, version in kept.items()] or [TORCH]
    constraints.write_text("\n".join(fixed))

    def install(what: str, *requirements: str) -> None:
        stamp, asked = folder / f"{what}.stamp", "\n".join(requirements)
        if stamp.exists() and stamp.read_text() == asked:
            return
        listed = folder / f"{what}.txt"
        listed.write_text(asked)
        session.install("--constraint", str(constraints), "--requirement", str(listed))
        stamp.write_text(asked)

    install("project", *sorted(set(extra("dev"))))
    host = host_folder(session, python)
    if host is None and "--no-host" not in session.posargs:
        install("comfy-cli", "comfy-cli")
        session.run(python, "-m", "tools.comfyui.install", "--install", success_codes=[0, 1])
        host = host_folder(session, python)
    if host is not None:
        install("host", *(host / "requirements.txt").read_text().splitlines())


def run(session: nox.Session, *arguments: str, **env: str) -> None:
    """Run a Python module in the shared environment."""
    folder = session.env_dir.parent / "environment"
    session.run(python_of(folder.absolute()), "-m", *arguments, external=True, env=env)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest with a process for each core; small models gain nothing from more threads."""
    spread = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadgroup")
    run(session, "pytest", *spread, *arguments, *session.posargs, OMP_NUM_THREADS="1")


@nox.session(venv_backend="none", requires=["environment"])
def demo(session: nox.Session) -> None:
    """Draw output/demo.png: references down, λ across; -- --models DIR uses published models."""
    run(session, "tools.demo", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def tests(session: nox.Session) -> None:
    """Run the day set; what needs ComfyUI skips without it, or fails where CI is set."""
    pytest(session, "-m", "not nightly")


@nox.session(name="tests-full", venv_backend="none", requires=["environment"])
def tests_full(session: nox.Session) -> None:
    """Run every test; -- -m nightly leaves out the day set."""
    pytest(session)


@nox.session(venv_backend="none", requires=["environment"])
def evaluate(session: nox.Session) -> None:
    """Write output/miniature.json: what follows the reference and what the text, in ComfyUI."""
    run(session, "miniature.evaluate", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def miniature(session: nox.Session) -> None:
    """Train the miniature anew, into output/: two hours on two CPU cores, -- --device cuda minutes.

    -- --seed 2 makes another.
    """
    run(session, "miniature", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def bench(session: nox.Session) -> None:
    """Write output/bench.json: what an image prompt adds; -- --device cuda times it on a GPU."""
    run(session, "benchmarks", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def hosts(session: nox.Session) -> None:
    """Try the versions of ComfyUI in a folder: -- FOLDER; writes output/hosts.json."""
    run(session, "tools.hosts", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def packs(session: nox.Session) -> None:
    """Try other packs beside this one, from checkouts in a folder: -- FOLDER."""
    folder, *others = session.posargs or ["."]
    run(session, "pip", "install", "-q", *OF_PACKS)
    place = {"IP_ADAPTER_PACKS": str(Path(folder).absolute())}
    run(session, "pytest", "tests/packs", "-q", "-rA", *others, OMP_NUM_THREADS="1", **place)


@nox.session(venv_params=["--system-site-packages"])
def lint(session: nox.Session) -> None:
    """Check formatting, style and types."""
    session.install(*LINTERS)
    session.run("python", "-m", "ruff", "check", ".")
    session.run("python", "-m", "ruff", "format", "--check", ".")
    session.run("python", "-m", "mypy", *CODE)
