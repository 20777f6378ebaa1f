"""Show what an adapter has learnt: a contact sheet and two curves every N steps.

The loss of a diffusion model says little. Here the same references, prompts, weights and seeds are
sampled each time, so that two sheets differ by training alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from ip_adapter_core.adapter import IPAdapter
from ip_adapter_core.contact_sheet import Column, Row, contact_sheet
from ip_adapter_core.files.atomic import atomic

from .checkpoints import make_writable
from .data.image import BrokenImageError, open_image
from .errors import TrainingError
from .evaluation.clip_score import Clip, clip_i, clip_t
from .models.base import Base
from .models.image_encoder import ImageEncoder
from .sampling import (
    NotFinite,
    Prompts,
    Sampler,
    SamplingSettings,
    encode_images,
    encode_text,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationSettings:
    """What is sampled: every reference with every prompt and seed, at every weight."""

    references: tuple[str, ...] = ()
    """Image files. Take some that are not in the training set."""
    prompts: tuple[str, ...] = ("",)
    """Texts beside the image; an empty one is the image alone."""
    weights: tuple[float, ...] = (0.0, 0.5, 1.0)
    """λ of each column; 0 is the base without the adapter."""
    seeds: tuple[int, ...] = (0,)
    """Of the starting noise; each makes a row more."""
    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(steps=30, batch=4))
    """Fewer steps than an evaluation has: these images are for the eye."""


class _Drawn(NamedTuple):
    """One cell; scores are None where there is nothing to measure."""

    cell: int
    image: Image.Image | None
    clip_i: float | None
    clip_t: float | None


class Validation:
    """Samples and writes a sheet when called.

    All inputs are opened and encoded at the start: the text encoders and `encoder` are not needed
    afterwards.

    `kind` is the adapter's `spec.features`. Without `clip` there are no curves. `scheduler` is
    `Sampler`'s. Raises TrainingError for settings that leave nothing to draw or name images that
    cannot be opened, or a folder that cannot be written to.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        base: Base,
        encoder: ImageEncoder,
        kind: str,
        folder: Path,
        clip: Clip | None = None,
        scheduler: Mapping[str, Any] | None = None,
    ) -> None:
        for name in ("references", "prompts", "weights", "seeds"):
            if not getattr(settings, name):
                raise TrainingError(f"{name} is empty: give at least one, or no validation.")
        self.settings, self.folder, self.clip = settings, folder, clip
        self._references = _opened(settings.references)
        self._rows = list(
            itertools.product(
                range(len(settings.references)), range(len(settings.prompts)), settings.seeds
            )
        )
        self._cells = list(itertools.product(range(len(self._rows)), settings.weights))
        self._sampler = Sampler(base, settings.sampling, scheduler)
        self._text = encode_text(base, settings.prompts)
        self._features, self._zero = encode_images(encoder, self._references, kind)
        if clip is not None:
            self._reference_embeds = clip.images(self._references)
            self._prompt_embeds = clip.texts(settings.prompts)
        make_writable(folder)

    def __call__(self, accelerator: Accelerator, adapter: IPAdapter, step: int) -> dict[str, float]:
        """Sample with `adapter` as it stands, each process its part.

        To be called by all processes; the main one writes `step-000500.png`. Returns the curves'
        values at `step`.

        No random state is changed. A sheet that cannot be sampled or written is reported in the log
        and training goes on.
        """
        with preserved_rng_state():
            numbers = list(range(len(self._cells)))
            with accelerator.split_between_processes(numbers) as mine:
                drawn = [x for part in self._parts(mine) for x in self._draw(adapter, part)]
            drawn = sorted(gather_object(drawn), key=lambda x: x[0])
        values = self._curves([_Drawn(*x) for x in drawn])
        accelerator.log(values, step=step)
        if accelerator.is_main_process:
            sheet = self._sheet([_Drawn(*x).image for x in drawn], values, step)
            self._write(sheet, step)
            _log_sheet(sheet, accelerator, step)
        return values

    def _write(self, sheet: Image.Image, step: int) -> None:
        """Write the sheet; a full disk must not end a training."""
        path = self.folder / f"step-{step:06d}.png"
        try:
            with atomic(path) as temporary:
                sheet.save(temporary, format="PNG")
        except OSError as error:
            logger.error("The contact sheet '%s' could not be written: %s", path, error)

    def _parts(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        size = self.settings.sampling.batch
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]

    def _draw(self, adapter: IPAdapter, numbers: Sequence[int]) -> list[_Drawn]:
        rows = [self._rows[self._cells[number][0]] for number in numbers]
        references, prompts = [row[0] for row in rows], [row[1] for row in rows]
        asked = Prompts(
            text=self._text[prompts],
            features=self._features[references],
            zero=self._zero,
            weights=[self._cells[number][1] for number in numbers],
            seeds=[row[2] for row in rows],
        )
        try:
            images = self._sampler.draw(adapter, asked)
        except NotFinite as error:
            logger.error("Validation: %s", error)
            return [_Drawn(number, None, None, None) for number in numbers]
        if self.clip is None:
            return [_Drawn(n, p, None, None) for n, p in zip(numbers, images, strict=True)]
        embeds = self.clip.images(images)
        image_scores = clip_i(embeds, self._reference_embeds[references]).tolist()
        text_scores: list[float | None] = [*clip_t(embeds, self._prompt_embeds[prompts]).tolist()]
        for place, prompt in enumerate(prompts):
            if not self.settings.prompts[prompt]:
                text_scores[place] = None  # no text to be true to
        return [
            _Drawn(*cell) for cell in zip(numbers, images, image_scores, text_scores, strict=True)
        ]

    def _curves(self, drawn: Sequence[_Drawn]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, weight in itertools.product(("clip_i", "clip_t"), self.settings.weights):
            found = [getattr(x, name) for x in drawn if self._cells[x.cell][1] == weight]
            scores = [score for score in found if score is not None]
            if scores:
                values[_curve(name, weight)] = fmean(scores)
        return values

    def _sheet(
        self, images: Sequence[Image.Image | None], values: Mapping[str, float], step: int
    ) -> Image.Image:
        columns = [Column("reference")]
        for weight in self.settings.weights:
            scores = [
                f"{label} {values[_curve(name, weight)]:.3f}"
                for name, label in (("clip_i", "CLIP-I"), ("clip_t", "CLIP-T"))
                if _curve(name, weight) in values
            ]
            columns.append(Column(f"weight {weight:g}", " · ".join(scores)))
        rows, wide = [], len(self.settings.weights)
        for number, (reference, prompt, seed) in enumerate(self._rows):
            text = self.settings.prompts[prompt]
            label = f"seed {seed} · " if len(self.settings.seeds) > 1 else ""
            label += f'"{text}"' if text else "image only"
            drawn = images[number * wide : (number + 1) * wide]
            rows.append(Row(label, [self._references[reference], *drawn]))
        return contact_sheet(rows, columns, title=f"step {step}")


def _curve(name: str, weight: float) -> str:
    return f"validation/{name}/weight_{weight:g}"


def _opened(paths: Sequence[str]) -> list[Image.Image]:
    images, failed = [], []
    for path in paths:
        try:
            images.append(open_image(Path(path)))
        except BrokenImageError as error:
            failed.append(f"'{path}' ({error})")
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(paths)} images in validation_image cannot be opened: "
            f"{', '.join(failed)}. Correct the paths, or leave them out."
        )
    return images


def _log_sheet(sheet: Image.Image, accelerator: Accelerator, step: int) -> None:
    """Give the sheet to those of a run's trackers that take images."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(sheet)[None]
            tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
        elif tracker.name in ("wandb", "swanlab"):
            tracker.log_images({"validation": [sheet]}, step=step)


@contextlib.contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's random number generators where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    # Only this process's device: asking the others would open them.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
