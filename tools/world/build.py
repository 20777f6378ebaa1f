"""Build the miniature anew: train every model, part by part, and write what is shipped.

    python -m tools.world [--seed 0] [--work .cache/build-SEED] [--out output/miniature-SEED]

Goes on where it stopped: a part whose file lies in the work folder is not made again.
miniature/manifest.json has the time that all took on two CPU cores, and every part: the last ones
were made side by side, on one core each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
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
    "autoencoder": (2500, 2500, 5000),
    "image encoder": 500,
    "judge": 1500,
    "latents": 16_000,
    "base": (1800, 1800, 1800),
    "pictures": 6000,
    "ip-adapter": ((2000, 2e-3),),
    "ip-adapter-plus": ((4000, 2e-3),),
    "control": 800,
    "second base": 600,
}
TOGETHER = "side by side"  # the time that the last parts took together
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


class PartError(RuntimeError):
    """A part was not made."""


@dataclass(frozen=True)
class Part:
    """`make` writes the file or folder `target` of a work folder, given its unfinished path."""

    name: str
    target: str
    make: Callable[[Path], object]


@dataclass(frozen=True)
class Build:
    """One build in the folder `work`, from the streams of `seed` on."""

    seed: int
    work: Path
    steps: Mapping[str, Any] = field(default_factory=lambda: STEPS)

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
            "steps": {**self.steps},
            "adapters": adapters.SETTINGS | adapters.RESAMPLER,
            "scenes": mark(),
        }
        return dict(json.loads(json.dumps(recipe)))

    def make(self, part: Part) -> None:
        """Make a part unless its file or folder is there, and note how long it took."""
        with FileLock(self.work / f"{part.target}.lock"):  # another process may be making it
            if (self.work / part.target).exists():
                logger.info("%s: there already", part.name)
                return
            logger.info("%s …", part.name)
            begun = time.monotonic()
            unfinished = self.work / f"unfinished-{part.target}"
            try:
                part.make(unfinished)
            finally:  # an interrupted attempt took its time too
                self.note(part.name, time.monotonic() - begun)
            os.replace(unfinished, self.work / part.target)

    def note(self, name: str, seconds: float) -> None:
        with FileLock(self.work / "seconds.lock"):
            times = self.times()
            times[name] = times.get(name, 0) + round(seconds)
            (self.work / "seconds.json").write_text(json.dumps(times, indent=1), encoding="utf-8")

    def times(self) -> dict[str, int]:
        path = self.work / "seconds.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def seconds(self) -> int:
        """That all took, of which what was made side by side counts once."""
        times = self.times()
        if TOGETHER in times:
            for part in self.last_parts():
                times.pop(part.name, None)
        return sum(times.values())

    def all(self) -> None:
        """Every part, each from those before. Raises RecipeError if `work` holds parts of another
        build, PartError if one of those that are made side by side failed."""
        self.begin()
        for part in self.frozen_parts():
            self.make(part)
        rest = [part for part in self.last_parts() if not (self.work / part.target).exists()]
        if rest and torch.get_num_threads() > 1:
            self.side_by_side([part.name for part in rest])
        else:
            for part in rest:
                self.make(part)

    def only(self, name: str) -> None:
        """One of the last parts, from those before."""
        self.begin()
        (part,) = (part for part in self.last_parts() if part.name == name)
        self.make(part)

    def side_by_side(self, names: Sequence[str]) -> None:
        """Make parts in processes of their own, which share the processors: two small trainings
        take less time so than one after the other."""
        processors = torch.get_num_threads()
        jobs = min(len(names), processors)
        threads = processors // jobs
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "tools.world", "--seed", str(self.seed)]
        command += ["--work", str(self.work), "--steps", json.dumps({**self.steps}), "--only"]

        def run(name: str) -> int:
            return subprocess.run([*command, name], cwd=ROOT, env=environment).returncode

        begun = time.monotonic()
        try:
            with ThreadPoolExecutor(jobs) as pool:
                codes = dict(zip(names, pool.map(run, names), strict=True))
        finally:
            self.note(TOGETHER, time.monotonic() - begun)
        if failed := [name for name, code in codes.items() if code]:
            raise PartError(
                f"{', '.join(failed)}: not made, see above for why. What was made is kept; the "
                "same command goes on from there."
            )

    def frozen_parts(self) -> Iterator[Part]:
        """What an adapter trains on, in order."""
        seed, steps = self.seed, self.steps

        def saved(model: torch.nn.Module) -> Mapping[str, Tensor]:
            return files.halved(model.state_dict())

        yield Part(
            "autoencoder",
            files.AUTOENCODER,
            lambda to: files.save(to, saved(autoencoder.train(seed, steps["autoencoder"]))),
        )
        yield Part(
            "image encoder",
            files.ENCODER,
            lambda to: files.save_encoder(to, image_encoder.train(seed, steps["image encoder"])),
        )
        yield Part(
            "judge",
            files.JUDGE,
            lambda to: files.save(to, saved(judge.train(seed, steps["judge"]))),
        )
        yield Part("texts", _TEXTS, lambda to: files.save(to, {"states": base.all_contexts()}))
        yield Part("latents", _LATENTS, self._latents)
        for number in range(1, len(steps["base"]) + 1):
            yield Part(f"base {number}", _BASE.format(number), partial(self._base, number))
        yield Part("8 bits", files.UNET, self._eight_bits)
        yield Part("checkpoint", _CHECKPOINT, self._checkpoint)
        yield Part(
            "pictures",
            "pictures",
            lambda to: adapters.write_pictures(to, seed + 1, steps["pictures"]),
        )
        frozen = self.work / _CHECKPOINT, self.work / files.ENCODER, self.work / "pictures"
        yield Part("cache", "cache", lambda to: adapters.cache(*frozen, to))

    def last_parts(self) -> Iterator[Part]:
        """What needs the frozen parts and nothing of each other; what takes longest comes first."""
        plus, small = files.ADAPTER_PLUS, files.ADAPTER
        yield Part(plus, plus, partial(self._adapter, "fine-grained", plus))
        yield Part(small, small, partial(self._adapter, "base", small))
        yield Part("concatenated", files.CONCATENATED, self._concatenated)
        yield Part("control", files.CONTROL, self._control)
        yield Part("second base", files.RESTYLED, self._restyled)

    def _frozen(self) -> tuple[autoencoder.Autoencoder, Any]:
        """Autoencoder and UNet as they are shipped."""
        unet = base.new(self.seed)
        state = files.dequantised(load_file(self.work / files.UNET))
        unet.load_state_dict({key: x.float() for key, x in state.items()})
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        return vae, unet.eval().requires_grad_(False)

    def _eight_bits(self, target: Path) -> None:
        last = _BASE.format(len(self.steps["base"]))
        files.save(target, files.quantised(_floats(self.work / last)))

    def _latents(self, target: Path) -> None:
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        made, kinds = base.latents(vae, self.seed, self.steps["latents"])
        files.save(target, {"latents": made, "kinds": kinds})

    def _base(self, number: int, target: Path) -> None:
        """One part of its training, from where the one before ended."""
        unet = base.new(self.seed)
        if number > 1:
            unet.load_state_dict(_floats(self.work / _BASE.format(number - 1)))
        pool = load_file(self.work / _LATENTS)
        context = load_file(self.work / _TEXTS)["states"]
        ends = list(itertools.accumulate(self.steps["base"], initial=0))
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
        for number, (steps, peak) in enumerate(self.steps[stem]):
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

    def _concatenated(self, target: Path) -> None:
        steps = sum(number for number, _ in self.steps["ip-adapter"])  # as long as the base adapter
        encoder = image_encoder.tower(self.work / files.ENCODER)
        asked = self.seed, self.steps["pictures"], steps
        made = concatenated.train(*self._frozen(), encoder, asked)
        files.save(target, files.quantised(made.state_dict()))

    def _control(self, target: Path) -> None:
        made = control.train_control(*self._frozen(), self.seed, self.steps["control"])
        files.save(target, files.quantised(made.state_dict()))

    def _restyled(self, target: Path) -> None:
        made = control.restyle(*self._frozen(), self.seed, self.steps["second base"])
        files.save(target, files.quantised(made))

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
            "seconds_in_all": self.seconds(),
            "files": {
                name: {"bytes": sizes[name], "sha256": files.checksum(out / name)} for name in made
            },
        }
        (out / files.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return sum(sizes.values())


def _floats(path: Path) -> dict[str, Tensor]:
    return {key: x.float() for key, x in load_file(path).items()}


def _changed(text: str) -> dict[str, Any]:
    """STEPS with what is given in its place."""
    given = json.loads(text)
    if not isinstance(given, dict) or given.keys() - STEPS.keys():
        raise argparse.ArgumentTypeError(
            f"{text}: expected an object whose keys are among {', '.join(STEPS)}"
        )
    return STEPS | given


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all weights, pictures and noise")
    parser.add_argument("--work", type=Path, help="folder of the parts")
    parser.add_argument("--out", type=Path, help="folder of what is shipped")
    parser.add_argument(
        "--steps", type=_changed, default=STEPS, metavar="JSON", help='others: {"control": 2000}'
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one of the last parts
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = asked.work or ROOT / ".cache" / f"build-{asked.seed}"
    out = asked.out or ROOT / "output" / f"miniature-{asked.seed}"
    build = Build(asked.seed, work.resolve(), asked.steps)
    try:
        if asked.only:
            return build.only(asked.only)
        build.all()
    except (RecipeError, PartError) as error:
        sys.exit(str(error))
    size = build.ship(out)
    print(f"{out}: {size / 1e6:.1f} MB, made in {build.seconds() / 60:.0f} minutes")
    print(f"{files.FOLDER_VARIABLE}={out} nox -s evaluate    # measures it")
