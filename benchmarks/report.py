"""What was measured: a table, and output/bench.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.comfyui.install import ROOT

OUTPUT = ROOT / "output" / "bench.json"


def table(results: Mapping[str, float], limits: Mapping[str, float | str]) -> None:
    """Print the results; a limit is the largest value allowed unless it is a text."""
    print(f"{'':32}{'measured':>12}{'limit':>10}")
    for name, value in results.items():
        limit = limits.get(name, "")
        print(f"{name:32}{value:>12.4g}{limit if isinstance(limit, str) else f'{limit:.4g}':>10}")
    print(OUTPUT)


def read() -> dict[str, Any]:
    """Return what the file holds."""
    return json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}


def write(results: Mapping[Any, Any], path: Path = OUTPUT) -> None:
    """Make these the file's whole content."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(results), indent=2) + "\n")


def progress(line: str) -> None:
    """Tell a person who waits."""
    print(line, file=sys.stderr, flush=True)
