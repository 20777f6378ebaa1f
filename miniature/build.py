"""Build the miniature anew: train every model, part by part, and write what is shipped.

    python -m miniature [--seed 0] [--device cpu] [--work .cache/build-SEED]
                        [--out output/miniature-SEED]

Goes on where it stopped: a part whose file lies in the work folder is not made again. On a GPU
(--device cuda; CUDA_VISIBLE_DEVICES says which) it takes minutes: images and texts are those of the
seed there too. A build's manifest.json has the time of the whole and of every part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from miniature import adapters, base, concatenated, control, files, models
from miniature.scenes import mark
from miniature.stages import Part, RecipeError, Stages, device
from tools.comfyui.install import ROOT

STEPS: dict[str, Any] = {
    "autoencoder": (2500, 2500, 5000),
    "image encoder": 1500,
    "judge": 1500,
    "latents": 16_000,
    "base": (1800, 1800, 1800),
    "pictures": 6000,
    "ip-adapter": ((2000, 2e-3),),
    "ip-adapter-plus": ((4000, 5e-4),),
    "control": 800,
    "second base": 800,
}
"""Steps of each part, or how many; under the names that manifests have."""
SHIPPED = (
    *(files.UNET, files.AUTOENCODER, files.ENCODER),
    *(files.ADAPTER, files.ADAPTER_PLUS, files.CLASSIFIER),
    *(files.CONTROL, files.SECOND_BASE, files.CONCATENATED),
)
_TEXTS, _LATENTS, _IMAGES, _CACHE = "texts.safetensors", "latents.safetensors", "images", "cache"
_BASE = "unet-{}.safetensors"  # after so many parts of its training, in float16
_CHECKPOINT = "checkpoint.safetensors"  # with the UNet as it is shipped, for the adapters


class Build(Stages):
    """One build in the folder `work`, from the streams of `seed` on."""

    def __init__(
        self, seed: int, work: Path, steps: Mapping[str, Any] = STEPS, device: str = "cpu"
    ) -> None:
        super().__init__(work, device)
        self.seed, self.steps = seed, steps

    def recipe(self) -> dict[str, Any]:
        recipe = {
            "seed": self.seed,
            "steps": {**self.steps},
            "texts": base.texts_recipe(),
            "adapters": adapters.OPTIONS,
            "resampler": adapters.RESAMPLER,
            "scenes": mark(),
        }
        return dict(json.loads(json.dumps(recipe)))

    def parts(self) -> list[Part]:
        count = len(self.steps["base"])
        plus, plain = files.ADAPTER_PLUS, files.ADAPTER
        return [
            ("autoencoder", files.AUTOENCODER, self._autoencoder),
            ("image encoder", files.ENCODER, self._image_encoder),
            ("texts", _TEXTS, self._texts),
            ("judge", files.CLASSIFIER, self._classifier),
            ("latents", _LATENTS, self._latents),
            *((f"base {n}", _BASE.format(n), partial(self._base, n)) for n in range(1, count + 1)),
            ("8 bits", files.UNET, self._eight_bits),
            ("checkpoint", _CHECKPOINT, self._checkpoint),
            ("pictures", _IMAGES, self._images),
            ("cache", _CACHE, self._cache),
            (plus, plus, partial(self._adapter, "plus", plus)),
            (plain, plain, partial(self._adapter, "base", plain)),
            ("control", files.CONTROL, self._control),
            ("concatenated", files.CONCATENATED, self._concatenated),
            ("second base", files.SECOND_BASE, self._second_base),
        ]

    def ship(self, out: Path) -> int:
        """Copy what is shipped, and write its manifest. Returns the bytes of all files."""
        out.mkdir(parents=True, exist_ok=True)
        for name in SHIPPED:
            adapter = name in (files.ADAPTER, files.ADAPTER_PLUS)
            copy = files.without_idle_layer if adapter else shutil.copyfile
            copy(self.work / name, out / name)
        times = self.times()
        manifest = {
            **self.recipe(),
            "made_on": " and ".join(times["made_on"]),
            "seconds": times["seconds"],
            "seconds_in_all": sum(times["seconds"].values()),
            "files": {
                name: {
                    "bytes": (out / name).stat().st_size,
                    "sha256": files.checksum(out / name),
                }
                for name in SHIPPED
            },
        }
        (out / files.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return sum(what["bytes"] for what in manifest["files"].values())

    def _trained(self, train: Callable[..., Any], part: str) -> Any:
        return train(self.seed, self.steps[part], device=self.device)

    def _autoencoder(self, target: Path) -> None:
        model = self._trained(models.train_autoencoder, "autoencoder")
        files.save(target, files.halved(model.state_dict()))

    def _image_encoder(self, target: Path) -> None:
        files.save_encoder(target, self._trained(models.train_image_encoder, "image encoder"))

    def _texts(self, target: Path) -> None:
        files.save(target, {"states": base.all_contexts(self.device)})

    def _classifier(self, target: Path) -> None:
        model = self._trained(models.train_classifier, "judge")
        files.save(target, files.halved(model.state_dict()))

    def _latents(self, target: Path) -> None:
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        latents, kinds = base.latents(vae, self.seed, self.steps["latents"])
        files.save(target, {"latents": latents, "kinds": kinds})

    def _base(self, number: int, target: Path) -> None:
        """Train the base for one part of its steps, from where the one before ended."""
        unet = base.new(self.seed)
        if number > 1:
            unet.load_state_dict(files.load(self.work / _BASE.format(number - 1)))
        pool = load_file(self.work / _LATENTS)
        context = load_file(self.work / _TEXTS)["states"]
        ends = list(itertools.accumulate(self.steps["base"], initial=0))
        base.train(
            unet,
            (pool["latents"], pool["kinds"]),
            context,
            self.seed,
            range(ends[number - 1], ends[number]),
            ends[-1],
            device=self.device,
        )
        files.save(target, files.halved(unet.state_dict()))

    def _eight_bits(self, target: Path) -> None:
        last = files.load(self.work / _BASE.format(len(self.steps["base"])))
        files.save(target, files.quantized(last))

    def _checkpoint(self, target: Path) -> None:
        unet = files.dequantized(load_file(self.work / files.UNET))
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        files.save(target, files.checkpoint(unet, vae))

    def _images(self, target: Path) -> None:
        adapters.write_images(target, self.seed + 1, self.steps["pictures"])

    def _cache(self, target: Path) -> None:
        frozen = self.work / _CHECKPOINT, self.work / files.ENCODER
        adapters.cache(*frozen, self.work / _IMAGES, target, device=self.device)

    def _adapter(self, variant: str, name: str, target: Path) -> None:
        """Train in cycles of steps and a peak learning rate, each from the adapter before."""
        stem = name.removesuffix(".safetensors")
        before: dict[str, Any] = {}
        for number, (steps, peak) in enumerate(self.steps[stem]):
            adapter = adapters.train(
                variant,
                self.work / _CHECKPOINT,
                self.work / files.ENCODER,
                self.work / _CACHE,
                self.work / f"run-{stem}-{number}",
                steps,
                seed=self.seed + number,
                learning_rate=peak,
                device=self.device,
                **before,
            )
            before = {"pretrained_ip_adapter_path": adapter}
        shutil.copyfile(adapter, target)

    def _frozen(self) -> tuple[models.Autoencoder, Any]:
        """Load autoencoder and UNet as they are shipped."""
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        return vae, files.frozen(base.new(self.seed), self.work / files.UNET)

    def _control(self, target: Path) -> None:
        model = self._trained(partial(control.train_control, *self._frozen()), "control")
        files.save(target, files.quantized(model.state_dict()))

    def _concatenated(self, target: Path) -> None:
        encoder = models.image_tower(self.work / files.ENCODER)
        steps = sum(number for number, _ in self.steps["ip-adapter"])  # as long as the base adapter
        images = self.steps["pictures"]
        model = concatenated.train(
            *self._frozen(), encoder, self.seed, images, steps, device=self.device
        )
        files.save(target, files.quantized(model.state_dict()))

    def _second_base(self, target: Path) -> None:
        change = self._trained(partial(control.train_second_base, *self._frozen()), "second base")
        files.save(target, files.quantized(change))


def steps(text: str) -> dict[str, Any]:
    """Read STEPS with what is given in its place, as JSON."""
    given = json.loads(text)
    if not isinstance(given, dict) or given.keys() - STEPS.keys():
        raise argparse.ArgumentTypeError(
            f"{text}: expected an object whose keys are among {', '.join(STEPS)}"
        )
    return STEPS | given


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all weights, images and noise")
    parser.add_argument("--device", type=device, default="cpu", help="what trains: cpu or cuda")
    parser.add_argument("--work", type=Path, help="folder of the parts")
    parser.add_argument("--out", type=Path, help="folder of what is shipped")
    parser.add_argument(
        "--steps", type=steps, default=STEPS, metavar="JSON", help='others: {"control": 2000}'
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = arguments.work or ROOT / ".cache" / f"build-{arguments.seed}"
    out = arguments.out or ROOT / "output" / f"miniature-{arguments.seed}"
    build = Build(arguments.seed, work.resolve(), arguments.steps, arguments.device)
    try:
        build.run()
    except RecipeError as error:
        sys.exit(str(error))
    size = build.ship(out)
    minutes = sum(build.times()["seconds"].values()) / 60
    print(f"{out}: {size / 1e6:.1f} MB, made in {minutes:.0f} minutes")
    print(f"{files.BUILD_VARIABLE}={out} nox -s evaluate    # measures it")
