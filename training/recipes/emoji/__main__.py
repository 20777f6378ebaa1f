"""Train on drawings that nobody here drew, from packages to figures, by one command.

    python -m training.recipes.emoji [--seed 0] [--device cpu] [--work output/emoji-SEED]
                                     [--packages FOLDER] [--steps JSON] [--mixed_precision no]

Goes on where it stopped, as `python -m miniature` does: base, autoencoder and encoder are the
miniature's code on these drawings, the adapters are trained by training/cache.py and
training/train.py. Ends with `report.json`, `samples.png` and `transfer.png` in the work folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from miniature import adapters, base, files, models
from miniature.stages import Part, RecipeError, Stages, device
from tools.comfyui.install import ROOT
from training.recipes.emoji import drawings, judges, measure
from training.recipes.emoji.pictures import Pictures

STEPS: dict[str, Any] = {
    "subjects": 1500,
    "references of a drawing": 3,
    "taught": 200,
    "autoencoder": (1500, 3500),
    "image encoder": 3000,
    "judge of hands": 2000,
    "judge of subjects": 1200,
    "base": (750,) * 3,
    "plain": 400,
    "style": 3000,
    "plus": 300,
    "references": 12,
}
"""Steps of each part; how many subjects the set has at most, how many of them the base is taught,
how many references a drawing has to learn from, and how many of each hand are measured."""
OPTIONS = {
    **adapters.OPTIONS,
    "train_batch_size": 32,
    "t_drop_rate": 0.1,
}
ADAPTERS = {"plain": "base", "style": "base", "plus": "plus"}
"""The adapters and their variants; "style" is trained on pairs of one hand."""
_BATCH, _BASE_BATCH = 16, 64
PRECISIONS = {"no": None, "bf16": torch.bfloat16}
_AUTOENCODER, _ENCODER, _CHECKPOINT = files.AUTOENCODER, files.ENCODER, "checkpoint.safetensors"
_HANDS, _SUBJECTS = "judge-of-hands.safetensors", "judge-of-subjects.safetensors"
_TEXTS, _LATENTS, _BASE = "texts.safetensors", "latents.safetensors", "unet-{}.safetensors"

Drawn = tuple[Tensor, Tensor, torch.Generator]


class Recipe(Stages):
    """One training in the folder `work`."""

    def __init__(
        self,
        seed: int,
        work: Path,
        steps: Mapping[str, Any],
        device: str,
        packages: Path,
        mixed_precision: str = "bf16",
    ) -> None:
        super().__init__(work, device)
        self.seed, self.steps, self.packages = seed, steps, packages
        self.mixed_precision, self.autocast = mixed_precision, PRECISIONS[mixed_precision]

    def recipe(self) -> dict[str, Any]:
        hands = [hand._asdict() for hand in drawings.HANDS]
        asked = {
            "seed": self.seed,
            "steps": {**self.steps},
            "mixed_precision": self.mixed_precision,
            "hands": hands,
            "adapters": OPTIONS,
        }
        return dict(json.loads(json.dumps(asked)))

    def parts(self) -> list[Part]:
        count = len(self.steps["base"])
        return [
            ("drawings", "set", self._drawings),
            ("autoencoder", _AUTOENCODER, self._autoencoder),
            ("image encoder", _ENCODER, self._image_encoder),
            ("judge of hands", _HANDS, partial(self._judge, "hands")),
            ("judge of subjects", _SUBJECTS, partial(self._judge, "subjects")),
            ("texts", _TEXTS, self._texts),
            ("latents", _LATENTS, self._latents),
            *((f"base {n}", _BASE.format(n), partial(self._base, n)) for n in range(1, count + 1)),
            ("checkpoint", _CHECKPOINT, self._checkpoint),
            ("pairs", "pairs", self._pairs),
            *((f"cache {x}", f"cache-{x}", partial(self._cached, x)) for x in ("plain", "style")),
            *((x, f"{x}.safetensors", partial(self._adapted, x)) for x in ADAPTERS),
            ("report", "report.json", self._report),
        ]

    @cached_property
    def pictures(self) -> Pictures:
        """All drawings, on white."""
        return Pictures(self.work / "set", self.seed, self.steps["taught"])

    def _drawings(self, target: Path) -> None:
        most, references = self.steps["subjects"], self.steps["references of a drawing"]
        drawings.write(target, self.packages, seed=self.seed, most=most, references=references)

    def _draw(self, numbers: Tensor, batch: int) -> Callable[[int], Drawn]:
        """Return what gives a step's images, moved and mirrored, their numbers and its dice."""

        def draw(step: int) -> Drawn:
            generator = torch.Generator().manual_seed(drawings.number(self.seed, step) % 2**62)
            rows = numbers[torch.randint(len(numbers), (batch,), generator=generator)]
            return self.pictures.images(rows, generator), rows, generator

        return draw

    def _autoencoder(self, target: Path) -> None:
        draw = self._draw(self.pictures.every, _BATCH)
        cycles = self.steps["autoencoder"]
        made = models.train_autoencoder(
            self.seed,
            cycles,
            device=self.device,
            draw=lambda step: draw(step)[0],
            autocast=self.autocast,
        )
        files.save(target, files.halved(made.state_dict()))

    def _image_encoder(self, target: Path) -> None:
        draw = self._draw(self.pictures.trained, 128)

        def described(step: int) -> tuple[Tensor, list[str]]:
            images, rows, generator = draw(step)
            return images, self.pictures.described(rows, generator)

        steps = self.steps["image encoder"]
        made = models.train_image_encoder(self.seed, steps, device=self.device, draw=described)
        files.save_encoder(target, made)

    def _judge(self, kind: str, target: Path) -> None:
        labels, rows = self.pictures.labels(kind)
        steps, drawn = self.steps[f"judge of {kind}"], self._draw(rows, 64)

        def draw(step: int) -> tuple[Tensor, Tensor]:
            images, chosen, _ = drawn(step)
            return images, labels[chosen]

        classes = int(labels.max()) + 1
        made = judges.train(kind, self.seed, steps, draw, classes, self.device, self.autocast)
        files.save(target, files.halved(made.state_dict()))

    def _texts(self, target: Path) -> None:
        texts = [*map(drawings.caption, self.pictures.taught), ""]
        files.save(target, {"states": models.text_states(texts, self.device, torch.float16)})

    @torch.no_grad()
    def _latents(self, target: Path) -> None:
        vae, known = files.autoencoder(self.work / _AUTOENCODER), self.pictures
        rows = known.of_taught(known.trained)
        encoded = [vae.encode(known.images(some)) for some in rows.split(256)]
        files.save(target, {"latents": torch.cat(encoded), "kinds": known.taught_subject[rows]})

    def _pairs(self, target: Path) -> None:
        """Write the lists that adapters learn from: what the base can draw, by any reference."""
        target.mkdir(exist_ok=True)
        for name in ("plain", "style"):
            lines = (self.work / "set" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            taught = {*self.pictures.taught}
            kept = [line for line in lines if json.loads(line)["subject"] in taught]
            (target / f"{name}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")

    def _base(self, number: int, target: Path) -> None:
        unet = base.new(self.seed)
        if number > 1:
            unet.load_state_dict(files.load(self.work / _BASE.format(number - 1)))
        pool, context = load_file(self.work / _LATENTS), load_file(self.work / _TEXTS)["states"]
        ends = list(itertools.accumulate(self.steps["base"], initial=0))

        def naming(subjects: Tensor, generator: torch.Generator) -> Tensor:
            dropped = torch.rand(len(subjects), generator=generator) < base.DROP_TEXT
            return torch.where(dropped, -1, subjects)

        part = range(ends[number - 1], ends[number])
        given = (pool["latents"], pool["kinds"]), context, self.seed, part, ends[-1], _BASE_BATCH
        # On CPUs flash attention's backward pass takes a fifth of a step's time.
        on_cpu = sdpa_kernel(SDPBackend.MATH) if self.device == "cpu" else nullcontext()
        with on_cpu:
            base.train(unet, *given, self.device, naming, self.autocast)
        files.save(target, files.halved(unet.state_dict()))

    def _checkpoint(self, target: Path) -> None:
        last = files.load(self.work / _BASE.format(len(self.steps["base"])))
        vae = files.autoencoder(self.work / _AUTOENCODER)
        files.save(target, files.checkpoint(last, vae))

    def _cached(self, name: str, target: Path) -> None:
        frozen, rows = self._inputs(), self.work / "pairs" / f"{name}.jsonl"
        pictures = self.work / "set" / "pictures"
        adapters.cache(*frozen, rows, target, device=self.device, data_root_path=pictures)

    def _adapted(self, name: str, target: Path) -> None:
        cached = self.work / ("cache-style" if name == "style" else "cache-plain")
        variant, steps = ADAPTERS[name], self.steps[name]
        run = self.work / f"run-{name}"
        rate = 5e-4 if variant == "plus" else 2e-3
        given = {
            **OPTIONS,
            **self._shown(steps),
            "checkpointing_steps": min(500, max(1, steps // 3)),
            "learning_rate": rate,
            "seed": self.seed,
        }
        made = adapters.train(
            variant, *self._inputs(), cached, run, steps, self.device, self.mixed_precision, **given
        )
        shutil.copyfile(made, target)

    def _shown(self, steps: int) -> dict[str, Any]:
        """Return the options of samples in the run's report: held-out references, two texts."""
        held = self.pictures.held_out_for("subject")
        names = [
            self.pictures.rows[int(n)]["file_name"] for n in held[:: max(1, len(held) // 3)][:3]
        ]
        return {
            "validation_steps": max(20, steps // 5),
            "validation_image": [self.work / "set" / "pictures" / name for name in names],
            "validation_prompt": [*map(drawings.caption, self.pictures.taught[:2])],
            "validation_num_inference_steps": 20,
            "validation_guidance_scale": 4.0,
        }

    def _inputs(self) -> tuple[Path, Path]:
        return self.work / _CHECKPOINT, self.work / _ENCODER

    def _report(self, target: Path) -> None:
        known = {
            kind: judges.load(self.work / name)
            for kind, name in (("hands", _HANDS), ("subjects", _SUBJECTS))
        }
        named = {name: self.work / f"{name}.safetensors" for name in ADAPTERS}
        frozen = self._inputs()
        found, sheets = measure.measured(
            self.pictures, *frozen, named, known, self.steps["references"], self.device
        )
        for name, sheet in sheets.items():
            sheet.save(self.work / f"{name}.png")
        found["seconds"] = self.times()["seconds"]
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all weights, pairs and noise")
    parser.add_argument("--device", type=device, default="cpu", help="what trains: cpu or cuda")
    parser.add_argument("--work", type=Path, help="folder of the parts")
    parser.add_argument("--packages", type=Path, help="folder of npm's packages")
    parser.add_argument(
        "--steps", type=json.loads, default={}, metavar="JSON", help='others: {"plain": 2000}'
    )
    parser.add_argument(
        "--mixed_precision",
        choices=PRECISIONS,
        default="bf16",
        help="of autoencoder, judges, base and adapters; no where the processor has no bfloat16",
    )
    given = parser.parse_args()
    unknown = given.steps.keys() - STEPS.keys()
    if unknown:
        parser.error(f"--steps names {', '.join(unknown)}; expected some of {', '.join(STEPS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = (given.work or ROOT / "output" / f"emoji-{given.seed}").resolve()
    packages = (given.packages or ROOT / ".cache" / "emoji").resolve()
    steps = {**STEPS, **given.steps}
    recipe = Recipe(given.seed, work, steps, given.device, packages, given.mixed_precision)
    try:
        recipe.run()
    except RecipeError as error:
        sys.exit(str(error))
    minutes = sum(recipe.times()["seconds"].values()) / 60
    print(f"{work / 'report.json'}, samples.png and transfer.png: {minutes:.0f} minutes in all")


if __name__ == "__main__":
    main()
