"""Try the pack on several versions of ComfyUI: the tests of nodes and sampling, and one picture.

    python -m tools.hosts FOLDER [FOLDER …]

Each folder is a ComfyUI, or holds some. In each version the day set of tests/nodes and
tests/sampling runs, then the shipped workflow text_and_image on the miniature, through a real
server. Prints a table, newest first, and what failed or was left out; writes output/hosts.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from miniature import assemble
from miniature.workflows import on_miniature
from tools.comfyui.install import PATH_VARIABLE, ROOT, is_comfyui
from tools.comfyui.server import Server
from tools.workflows.api import read

TESTS = ("tests/nodes", "tests/sampling")
WORKFLOW, TEXT = "text_and_image", "a star"


@dataclass
class Outcome:
    """What one version gave. `largest`: by how much an 8-bit pixel differs from the newest's."""

    version: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    picture: str = ""
    largest: int | None = None


def version_of(host: Path) -> str:
    found = re.search(r"__version__ = \"(.+?)\"", (host / "comfyui_version.py").read_text("utf-8"))
    return found[1] if found else "unknown"


def hosts_in(folders: list[Path]) -> list[Path]:
    """Return every ComfyUI among the folders and what they hold, the newest version first."""
    found = [x for folder in folders for x in (folder, *folder.iterdir()) if is_comfyui(x)]
    return sorted(found, key=lambda host: [*map(int, version_of(host).split("."))], reverse=True)


def run_tests(host: Path, outcome: Outcome) -> None:
    """Run the tests of nodes and sampling in `host`."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        spread = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadgroup")
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", *spread, "-m", "not nightly"),
                *("--junitxml", str(report), *TESTS),
            ],
            cwd=ROOT,
            env={**os.environ, PATH_VARIABLE: str(host), "OMP_NUM_THREADS": "1", "CI": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if not report.is_file():
            outcome.failed.append("pytest did not run")
            return
        skipped: Counter[str] = Counter()
        for case in ET.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}".partition("@")[0]
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                outcome.failed.append(name)
            elif skip is not None:
                skipped[str(skip.get("message"))] += 1
            else:
                outcome.passed += 1
        outcome.skipped = dict(skipped)


def draw(host: Path, outcome: Outcome) -> np.ndarray[Any, Any] | None:
    """Run the shipped workflow in a server of `host`; note what goes wrong."""
    try:
        with Server(assemble.ensure(), host) as client:
            images = client.run(on_miniature(read(WORKFLOW), TEXT)).images
    except Exception as error:  # a version in which nothing runs is an outcome too
        outcome.picture = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None
    (data,) = (image for node in images.values() for image in node)
    outcome.picture = "drawn"
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)


def row(outcome: Outcome) -> str:
    """Return a version's line of the table."""
    skips = sum(outcome.skipped.values())
    same = outcome.picture if outcome.largest is None else f"{outcome.largest} of 255"
    cells = [outcome.version, outcome.passed, len(outcome.failed), skips, same]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    hosts = hosts_in(parser.parse_args().folders)
    if not hosts:
        parser.error("no ComfyUI is in these folders")
    outcomes, newest = [], None
    print("| ComfyUI | passed | failed | left out | picture differs by |\n|---|---|---|---|---|")
    for host in hosts:
        outcome = Outcome(version_of(host))
        run_tests(host, outcome)
        image = draw(host, outcome)
        if image is not None:
            newest = image if newest is None else newest
            outcome.largest = int(abs(image - newest).max())
        outcomes.append(outcome)
        print(row(outcome), flush=True)
    for outcome in outcomes:
        for name in outcome.failed:
            print(f"{outcome.version} failed: {name}")
        for reason, count in outcome.skipped.items():
            print(f"{outcome.version} left out {count}: {reason}")
    out = ROOT / "output" / "hosts.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2), "utf-8")


if __name__ == "__main__":
    main()
