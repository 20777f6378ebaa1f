"""A build of the miniature: its parts, each trained or made from those before, and what is
shipped."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from miniature import (
    adapters,
    autoencoder,
    base,
    concatenated,
    control,
    files,
    image_encoder,
)
from miniature import (
    classifier as judge,
)
from miniature.parts import Part, Stage, Work
from miniature.scenes import mark

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
_TEXTS = "texts.safetensors"
_LATENTS = "latents.safetensors"
_BASE = "unet-{}.safetensors"  # after so many parts of its training, in float16
_CHECKPOINT = "checkpoint.safetensors"  # with the UNet as it is shipped, for the adapters
_SHIPPED = (
    *(files.UNET, files.AUTOENCODER, files.ENCODER),
    *(files.ADAPTER, files.ADAPTER_PLUS, files.JUDGE),
    *(files.CONTROL, files.RESTYLED, files.CONCATENATED),
)


class Build(Work):
    """One build in the folder `work`, from the streams of `seed` on."""

    def __init__(
        self, seed: int, work: Path, steps: Mapping[str, Any] = STEPS, device: str = "cpu"
    ) -> None:
        super().__init__(work, _hardware(device))
        self.seed, self.steps, self.device = seed, steps, device

    def recipe(self) -> dict[str, Any]:
        """What was asked for, as JSON has it: seed, steps, texts, the adapters' settings, and
        the set."""
        recipe = {
            "seed": self.seed,
            "steps": {**self.steps},
            "texts": base.told(),
            "adapters": adapters.SETTINGS,
            "resampler": adapters.RESAMPLER,
            "scenes": mark(),
        }
        return dict(json.loads(json.dumps(recipe)))

    def command(self, name: str) -> list[str]:
        """Makes the part of that name in a process of its own."""
        given = {"seed": str(self.seed), "work": str(self.work), "only": name}
        given["device"] = self.device
        given["steps"] = json.dumps({**self.steps})
        options = (part for key, value in given.items() for part in (f"--{key}", value))
        return [sys.executable, "-m", "miniature", *options]

    def stages(self) -> Iterator[Stage]:
        """First what needs nothing, then the base, which an adapter trains on, then the rest."""
        yield self._first_parts()
        yield (Part("latents", _LATENTS, self._latents),)
        for number in range(1, len(self.steps["base"]) + 1):
            yield (Part(f"base {number}", _BASE.format(number), partial(self._base, number)),)
        yield (Part("8 bits", files.UNET, self._eight_bits),)
        yield (Part("checkpoint", _CHECKPOINT, self._checkpoint),)
        yield (Part("pictures", "pictures", self._pictures),)
        yield (Part("cache", "cache", self._cache),)
        yield self._last_parts()

    def _first_parts(self) -> Stage:
        return (
            Part("autoencoder", files.AUTOENCODER, self._autoencoder),
            Part("image encoder", files.ENCODER, self._image_encoder),
            Part("texts", _TEXTS, self._texts),
            Part("judge", files.JUDGE, self._judge),
        )

    def _last_parts(self) -> Stage:
        plus, small = files.ADAPTER_PLUS, files.ADAPTER
        return (
            Part(plus, plus, partial(self._adapter, "plus", plus)),
            Part(small, small, partial(self._adapter, "base", small)),
            Part("control", files.CONTROL, self._control),
            Part("concatenated", files.CONCATENATED, self._concatenated),
            Part("second base", files.RESTYLED, self._restyled),
        )

    def _autoencoder(self, target: Path) -> None:
        made = autoencoder.train(self.seed, self.steps["autoencoder"], device=self.device)
        files.save(target, files.halved(made.state_dict()))

    def _image_encoder(self, target: Path) -> None:
        made = image_encoder.train(self.seed, self.steps["image encoder"], device=self.device)
        files.save_encoder(target, made)

    def _texts(self, target: Path) -> None:
        files.save(target, {"states": base.all_contexts(self.device)})

    def _judge(self, target: Path) -> None:
        made = judge.train(self.seed, self.steps["judge"], device=self.device)
        files.save(target, files.halved(made.state_dict()))

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
        made = load_file(self.work / _LATENTS)
        context = load_file(self.work / _TEXTS)["states"]
        ends = list(itertools.accumulate(self.steps["base"], initial=0))
        part = range(ends[number - 1], ends[number])
        pool = made["latents"], made["kinds"]
        base.train(unet, pool, context, self.seed, part, ends[-1], device=self.device)
        files.save(target, files.halved(unet.state_dict()))

    def _checkpoint(self, target: Path) -> None:
        unet = files.dequantised(load_file(self.work / files.UNET))
        vae = files.autoencoder(self.work / files.AUTOENCODER)
        files.save(target, files.checkpoint(unet, vae))

    def _pictures(self, target: Path) -> None:
        adapters.write_pictures(target, self.seed + 1, self.steps["pictures"])

    def _cache(self, target: Path) -> None:
        frozen = self.work / _CHECKPOINT, self.work / files.ENCODER, self.work / "pictures"
        adapters.cache(*frozen, target, device=self.device)

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
                device=self.device,
                **before,
            )
            before = {"adapter": made}
        shutil.copyfile(made, target)

    def _concatenated(self, target: Path) -> None:
        steps = sum(number for number, _ in self.steps["ip-adapter"])  # as long as the base adapter
        encoder = image_encoder.tower(self.work / files.ENCODER)
        asked = self.seed, self.steps["pictures"], steps
        made = concatenated.train(*self._frozen(), encoder, asked, device=self.device)
        files.save(target, files.quantised(made.state_dict()))

    def _control(self, target: Path) -> None:
        made = control.train_control(
            *self._frozen(), self.seed, self.steps["control"], device=self.device
        )
        files.save(target, files.quantised(made.state_dict()))

    def _restyled(self, target: Path) -> None:
        made = control.restyle(
            *self._frozen(), self.seed, self.steps["second base"], device=self.device
        )
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
        times = self.times()
        manifest = {
            **self.recipe(),
            **times,
            "made_on": " and ".join(times["made_on"]),
            "seconds_in_all": self.seconds(),
            "files": {
                name: {"bytes": sizes[name], "sha256": files.checksum(out / name)} for name in made
            },
        }
        (out / files.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return sum(sizes.values())


def _floats(path: Path) -> dict[str, Tensor]:
    return {key: x.float() for key, x in load_file(path).items()}


def _hardware(device: str) -> str:
    """What trains, by name."""
    threads = f"{torch.get_num_threads()} CPU threads"
    return threads if device == "cpu" else f"{torch.cuda.get_device_name(device)}, {threads}"
