"""`nox -s bench`: measures, prints a table, writes output/bench.json.

python -m benchmarks [--rounds 15] [--peer PATH_OF_ComfyUI_IPAdapter_plus]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.comfyui import install as host

from . import budget, overhead, report, share, training
from .world import World

LIMITS: dict[str, float | str] = {
    "kernels_per_layer": 2.5,
    "kernels_per_layer_mask": 3.5,
    "kernels_per_layer_curve": 2.5,
    "syncs_per_step": 0,
    "kernels_outside_window": 0,
    "resident_adapter_parameters": 0,
    "ratio_one": 1.01,
    "ratio_mask": 1.02,
    "ratio_three": 1.02,
    "own_one": 1.01,
    "own_mask": 1.02,
    "own_three": 1.02,
    **training.LIMITS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each variant")
    parser.add_argument("--peer", type=Path, help="folder of ComfyUI_IPAdapter_plus to compare")
    arguments = parser.parse_args()

    host.require()  # what follows would be minutes for nothing
    trained = training.measure(max(20, arguments.rounds), report.progress)
    world = World.build()
    results = budget.measure(world)
    models = overhead.variants(world.model, world.apply)
    if arguments.peer:
        from . import peer

        results |= peer.counts(world, arguments.peer)
        models |= peer.variants(world, arguments.peer)
    results |= overhead.measure(world.model, models, arguments.rounds, report.progress)
    results |= share.measure(world, rounds=min(arguments.rounds, 5))
    results |= trained

    report.write(results)
    report.table(results, LIMITS)


if __name__ == "__main__":
    main()
