"""What was measured: a table, and output/bench.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from tools.host import ROOT

OUTPUT = ROOT / "output" / "bench.json"


def publish(results: Mapping[str, float], limits: Mapping[str, float | str]) -> None:
    """Print the results; in the file they replace those of the same names."""
    OUTPUT.parent.mkdir(exist_ok=True)
    before = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    OUTPUT.write_text(json.dumps({**before, **results}, indent=2) + "\n")
    print(f"{'':32}{'measured':>12}{'limit':>10}")
    for name, value in results.items():
        print(f"{name:32}{value:>12.4g}{limits.get(name, ''):>10}")
    print(OUTPUT)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
