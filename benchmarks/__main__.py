"""`nox -s bench`: measures, prints a table, writes output/bench.json.

python -m benchmarks [--rounds 15] [--peer PATH_OF_ComfyUI_IPAdapter_plus]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tools.host import ROOT

from . import budget, overhead, share
from .world import World

OUTPUT = ROOT / "output" / "bench.json"
LIMITS = {
    "kernels_per_layer": 2.5,
    "kernels_per_layer_mask": 3.5,
    "syncs_per_step": 0,
    "kernels_outside_window": 0,
    "resident_adapter_parameters": 0,
    "ratio_one": 1.01,
    "ratio_mask": 1.02,
    "ratio_three": 1.02,
    "own_one": 1.01,
    "own_mask": 1.02,
    "own_three": 1.02,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each variant")
    parser.add_argument("--peer", type=Path, help="folder of ComfyUI_IPAdapter_plus to compare")
    arguments = parser.parse_args()

    world = World.build()
    results = budget.measure(world)
    models = overhead.variants(world.model, world.apply)
    if arguments.peer:
        from . import peer

        results |= peer.counts(world, arguments.peer)
        models |= peer.variants(world, arguments.peer)
    results |= overhead.measure(world.model, models, arguments.rounds, _progress)
    results |= share.measure(world, rounds=min(arguments.rounds, 5))

    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'':32}{'measured':>12}{'limit':>10}")
    for name, value in results.items():
        print(f"{name:32}{value:>12.4g}{LIMITS.get(name, ''):>10}")
    print(OUTPUT)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
