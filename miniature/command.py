"""Build the miniature anew: train every model, part by part, and write what is shipped.

    python -m miniature [--seed 0] [--device cpu] [--work .cache/build-SEED]
                          [--out output/miniature-SEED]

Goes on where it stopped: a part whose file lies in the work folder is not made again.
On a GPU (--device cuda; CUDA_VISIBLE_DEVICES says which) it takes minutes: pictures and texts are
those of the seed there too. A build's manifest.json has the time of the whole and of every part.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from miniature import files
from miniature.build import STEPS, Build
from miniature.parts import PartError, RecipeError
from tools.comfyui.install import ROOT


def changed(text: str) -> dict[str, Any]:
    """STEPS with what is given in its place."""
    given = json.loads(text)
    if not isinstance(given, dict) or given.keys() - STEPS.keys():
        raise argparse.ArgumentTypeError(
            f"{text}: expected an object whose keys are among {', '.join(STEPS)}"
        )
    return STEPS | given


def device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(
            f"{text}: expected cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU"
        )
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"cuda: torch {torch.__version__} finds no GPU that it can use. Give cpu, or install "
            "PyTorch for your GPU."
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all weights, pictures and noise")
    parser.add_argument("--device", type=device, default="cpu", help="what trains: cpu or cuda")
    parser.add_argument("--work", type=Path, help="folder of the parts")
    parser.add_argument("--out", type=Path, help="folder of what is shipped")
    parser.add_argument(
        "--steps", type=changed, default=STEPS, metavar="JSON", help='others: {"control": 2000}'
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one part
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = asked.work or ROOT / ".cache" / f"build-{asked.seed}"
    out = asked.out or ROOT / "output" / f"miniature-{asked.seed}"
    build = Build(asked.seed, work.resolve(), asked.steps, asked.device)
    try:
        if asked.only:
            return build.only(asked.only)
        build.all()
    except (RecipeError, PartError) as error:
        sys.exit(str(error))
    size = build.ship(out)
    print(f"{out}: {size / 1e6:.1f} MB, made in {build.seconds() / 60:.0f} minutes")
    print(f"{files.FOLDER_VARIABLE}={out} nox -s evaluate    # measures it")
