"""`nox -s bench`: measures, prints a table, writes output/bench.json.

python -m benchmarks [--rounds 15] [--peer PATH_OF_ComfyUI_IPAdapter_plus]
python -m benchmarks --device cuda [--peer PATH]   seconds a step on a GPU, see `on_device`
python -m benchmarks --device cpu --small          the same measurement, to try it without one
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.comfyui import install as host

from . import budget, faces, flux, on_device, overhead, peer, report, share, training
from .full_size import Setup

LIMITS: dict[str, float | str] = {
    "kernels_per_layer": 2.5,
    "kernels_per_layer_mask": 3.5,
    "kernels_per_layer_curve": 2.5,
    "kernels_per_layer_face": 2.5,
    "syncs_per_step": 0,
    "kernels_outside_window": 0,
    "resident_adapter_parameters": 0,
    "ratio_one": 1.01,
    "ratio_mask": 1.02,
    "ratio_three": 1.02,
    "own_one": 1.01,
    "own_mask": 1.02,
    "own_three": 1.02,
    **flux.LIMITS,
    "face_ratio": 1.0,
    **training.LIMITS,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each variant")
    parser.add_argument("--peer", type=Path, help="folder of ComfyUI_IPAdapter_plus to compare")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="time sampling steps there, and nothing else"
    )
    parser.add_argument("--small", action="store_true", help="with --device: small models")
    given = parser.parse_args(arguments)
    if given.device:
        try:
            on_device.run(given.device, given.small, given.rounds, given.peer)
        except ValueError as error:
            parser.error(str(error))
        return

    host.require()  # what follows would be minutes for nothing
    trained = training.measure(max(20, given.rounds))
    setup = Setup.build()
    results = budget.measure(setup)
    models = {f"ratio_{name}": model for name, model in setup.variants().items()}
    if given.peer:
        theirs = peer.variants(setup, given.peer)
        results |= peer.counts(setup, theirs)
        models |= {f"peer_ratio_{name}": model for name, model in theirs.items()}
    results |= overhead.measure(setup, models, given.rounds)
    results |= share.measure(setup, rounds=min(given.rounds, 5))
    results |= flux.measure()
    results |= faces.measure(max(30, given.rounds))
    results |= trained

    report.write(results)
    report.table(results, LIMITS)


if __name__ == "__main__":
    main()
