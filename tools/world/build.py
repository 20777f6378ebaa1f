"""Build the miniature anew: train every model, part by part, and write what is shipped.

    python -m tools.world [--seed 0] [--work .cache/build-SEED] [--out output/miniature-SEED]

Goes on where it stopped: a part whose file lies in the work folder is not made again.
miniature/manifest.json has the time that every part took on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.host import ROOT
from tools.world import (
    adapters,
    autoencoder,
    base,
    concatenated,
    control,
    files,
    image_encoder,
    judge,
)
from tools.world.scenes import mark

logger = logging.getLogger("comfyui_ip_adapter.tools")

STEPS: dict[str, Any] = {
    "autoencoder": (2500, 2500, 6000),
    "image encoder": 500,
    "judge": 1500,
    "latents": 16_000,
    "base": (1800, 1800, 1800),
    "pictures": 3000,
    "ip-adapter": ((1600, 2e-3),),
    "ip-adapter-plus": ((1600, 2e-3),),
    "control": 300,
    "second base": 400,
}
_RECIPE = "recipe.json"
_TEXTS = "texts.safetensors"
_LATENTS = "latents.safetensors"
_BASE = "unet-{}.safetensors"  # after so many parts of its training, in float16
_CHECKPOINT = "checkpoint.safetensors"  # with the UNet as it is shipped, for the adapters
_SHIPPED = (
    *(files.UNET, files.AUTOENCODER, files.ENCODER),
    *(files.ADAPTER, files.ADAPTER_PLUS, files.JUDGE),
    *(files.CONTROL, files.RESTYLED, files.CONCATENATED),
)


class RecipeError(ValueError):
    """A work folder holds parts of another build."""


@dataclass(frozen=True)
class Build:
    """One build in the folder `work`, from the streams of `seed` on."""

    seed: int
    work: Path

    def begin(self) -> None:
        """Make the folder, which is of one seed and one recipe. Raises RecipeError if it holds
        parts of another."""
        self.work.mkdir(parents=True, exist_ok=True)
        path, ours = self.work / _RECIPE, json.dumps(self.recipe(), indent=1)
        if not any(self.work.iterdir()):
            path.write_text(ours, encoding="utf-8")
        theirs = path.read_text(encoding="utf-8") if path.exists() else "no recipe at all"
        if theirs != ours:
            raise RecipeError(
                f"'{self.work}' holds parts of another build: {_RECIPE} has {theirs}; expected "
                f"{ours}. Give another folder with --work, or delete this one."
            )

    def recipe(self) -> dict[str, Any]:
        """What was asked for, as JSON has it: seed, steps, the adapters' settings, and the set."""
        recipe = {
            "seed": self.seed,
            "steps": STEPS,
            "adapters": adapters.SETTINGS | adapters.RESAMPLER,
            "scenes": mark(),
        }
        return dict(json.loads(json.dumps(recipe)))

    def part(self, name: str, target: str, make: Callable[[Path], object]) -> None:
        """Make a part unless its file or folder is there, and note how long it took."""
        if (self.work / target).exists():
            logger.info("%s: there already", name)
            return
        logger.info("%s …", name)
        begun = time.monotonic()
        unfinished = self.work / f"unfinished-{target}"
        try:
            make(unfinished)
        finally:  # an interrupted attempt took its time too
            self.note(name, time.monotonic() - begun)
        os.replace(unfinished, self.work / target)

    def note(self, name: str, seconds: float) -> None:
        times = self.times()
        times[name] = times.get(name, 0) + round(seconds)
        (self.work / "seconds.json").write_text(json.dumps(times, indent=1), encoding="utf-8")

    def times(self) -> dict[str, int]:
        path = self.work / "seconds.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def all(self) -> None:
        """Every part, each from those before. Raises RecipeError if `work` holds parts of another
        build."""
        self.begin()
        at, seed = self.work, self.seed

        def saved(model: torch.nn.Module) -> Mapping[str, Tensor]:
            return files.halved(model.state_dict())

        self.part(
            "autoencoder",
            files.AUTOENCODER,
            lambda to: files.save(to, saved(autoencoder.train(seed, STEPS["autoencoder"]))),
        )
        self.part(
            "image encoder",
            files.ENCODER,
            lambda to: files.save_encoder(to, image_encoder.train(seed, STEPS["image encoder"])),
        )
        self.part(
            "judge",
            files.JUDGE,
            lambda to: files.save(to, saved(judge.train(seed, STEPS["judge"]))),
        )
        self.part("texts", _TEXTS, lambda to: files.save(to, {"states": base.all_contexts()}))
        self.part("latents", _LATENTS, self._latents)
        parts = len(STEPS["base"])
        for number in range(1, parts + 1):
            self.part(
                f"base {number}",
                _BASE.format(number),
                lambda to, n=number: self._base(n, to),  # type: ignore[misc]
            )
        self.part(
            "8 bits",
            files.UNET,
            lambda to: files.save(to, files.quantised(_floats(at / _BASE.format(parts)))),
        )
        self.part("checkpoint", _CHECKPOINT, self._checkpoint)
        self.part(
            "pictures",
            "pictures",
            lambda to: adapters.write_pictures(to, seed + 1, STEPS["pictures"]),
        )
        frozen = at / _CHECKPOINT, at / files.ENCODER
        self.part("cache", "cache", lambda to: adapters.cache(*frozen, at / "pictures", to))
        for variant, name in (("base", files.ADAPTER), ("fine-grained", files.ADAPTER_PLUS)):
            self.part(name, name, lambda to, v=variant, n=name: self._adapter(v, n, to))  # type: ignore[misc]

        self.part(
            "control",
            files.CONTROL,
            lambda to: files.save(
                to,
                files.quantised(
                    control.train_control(*self._frozen(), seed, STEPS["control"]).state_dict()
                ),
            ),
        )
        self.part(
            "second base",
            files.RESTYLED,
            lambda to: files.save(
                to, files.quantised(control.restyle(*self._frozen(), seed, STEPS["second base"]))
            ),
        )

        self.part(
            "concatenated",
            files.CONCATENATED,
            lambda to: files.save(
                to,
                files.quantised(
                    concatenated.train(
                        *self._frozen(),
                        image_encoder.tower(at / files.ENCODER),
                        (seed, STEPS["pictures"], sum(steps for steps, _ in STEPS["ip-adapter"])),
                    ).state_dict()
                ),
            ),
        )

    def _frozen(self) -> tuple[autoencoder.Autoencoder, Any]:
        """Autoencoder and UNet as they are shipped."""
        unet = base.new(self.seed)
        state = files.dequantised(load_file(self.work / files.UNET))
        unet.load_state_dict({key: x.float() for key, x in state.items()})
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        return vae, unet.eval().requires_grad_(False)

    def _latents(self, target: Path) -> None:
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        made, kinds = base.latents(vae, self.seed, STEPS["latents"])
        files.save(target, {"latents": made, "kinds": kinds})

    def _base(self, number: int, target: Path) -> None:
        """One part of its training, from where the one before ended."""
        unet = base.new(self.seed)
        if number > 1:
            unet.load_state_dict(_floats(self.work / _BASE.format(number - 1)))
        pool = load_file(self.work / _LATENTS)
        context = load_file(self.work / _TEXTS)["states"]
        ends = list(itertools.accumulate(STEPS["base"], initial=0))
        part = range(ends[number - 1], ends[number])
        base.train(unet, (pool["latents"], pool["kinds"]), context, self.seed, part, ends[-1])
        files.save(target, files.halved(unet.state_dict()))

    def _checkpoint(self, target: Path) -> None:
        unet = files.dequantised(load_file(self.work / files.UNET))
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        files.save(target, files.checkpoint(unet, vae))

    def _adapter(self, variant: str, name: str, target: Path) -> None:
        """In cycles of steps and a peak learning rate, each from the adapter before."""
        stem = name.removesuffix(".safetensors")
        before: dict[str, Any] = {}
        for number, (steps, peak) in enumerate(STEPS[stem]):
            made = adapters.train(
                variant,
                self.work / _CHECKPOINT,
                self.work / files.ENCODER,
                self.work / "cache",
                self.work / f"run-{stem}-{number}",
                steps,
                seed=self.seed + number,
                learning_rate=peak,
                **before,
            )
            before = {"adapter": made}
        shutil.copyfile(made, target)

    def ship(self, out: Path) -> int:
        """Copy what is shipped, and write its manifest. Returns the bytes of all files."""
        out.mkdir(parents=True, exist_ok=True)
        made = [name for name in _SHIPPED if (self.work / name).exists()]
        for name in made:
            if name in (files.ADAPTER, files.ADAPTER_PLUS):
                files.without_idle_layer(self.work / name, out / name)
            else:
                shutil.copyfile(self.work / name, out / name)
        sizes = {name: (out / name).stat().st_size for name in made}
        manifest = {
            **self.recipe(),
            "seconds": self.times(),
            "files": {
                name: {"bytes": sizes[name], "sha256": files.checksum(out / name)} for name in made
            },
        }
        (out / files.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return sum(sizes.values())


def _floats(path: Path) -> dict[str, Tensor]:
    return {key: x.float() for key, x in load_file(path).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all weights, pictures and noise")
    parser.add_argument("--work", type=Path, help="folder of the parts")
    parser.add_argument("--out", type=Path, help="folder of what is shipped")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = asked.work or ROOT / ".cache" / f"build-{asked.seed}"
    out = asked.out or ROOT / "output" / f"miniature-{asked.seed}"
    build = Build(asked.seed, work.resolve())
    try:
        build.all()
    except RecipeError as error:
        sys.exit(str(error))
    size = build.ship(out)
    seconds = sum(build.times().values())
    print(f"{out}: {size / 1e6:.1f} MB, trained in {seconds / 60:.0f} minutes")
    print(f"{files.FOLDER_VARIABLE}={out} nox -s evaluate    # measures it")
