"""Show what an adapter has learnt, every N steps: a contact sheet and its curves, a held-out loss.

The loss of a diffusion model says little. Here the same references, prompts, weights and seeds are
sampled each time, so that two sheets differ by training alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from ip_adapter_core.adapter import IPAdapter
from ip_adapter_core.contact_sheet import Column, Row, contact_sheet
from ip_adapter_core.files.atomic import atomic

from .checkpoints import make_writable
from .config import ValidationConfig
from .data.image import BrokenImageError, open_image
from .errors import TrainingError
from .evaluation.clip_score import Clip, clip_i, clip_t
from .loss import Batch
from .models.base import Base
from .models.frozen import ReferenceEncoder
from .sampling import (
    NotFinite,
    Prompts,
    Sampler,
    SamplingOptions,
    encode_images,
    encode_text,
)

FOLDER = "validation"  # of a run, for its sheets
SEED = 0  # of the starting noise
BATCH = 4  # images at once
SCORES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T"}

logger = logging.getLogger(__name__)


class _Cell(NamedTuple):
    """Numbers of a reference and a prompt, which make a row, and λ, which makes a column."""

    reference: int
    prompt: int
    weight: float


class _Drawn(NamedTuple):
    """A cell's image, None if it became NaN, and those of its scores that there are."""

    cell: int
    image: Image.Image | None
    scores: dict[str, float]


class Validation:
    """Samples and writes a sheet when called.

    All inputs are opened and encoded at the start: the text encoders and `encoder` are not needed
    afterwards.

    `kind` is the adapter's `spec.features`. Without `clip` there are no curves. `scheduler` and
    `size`, the images' height and width, are `Sampler`'s. Raises TrainingError for options
    that leave nothing to draw or name images that cannot be opened, or a folder that cannot be
    written to.
    """

    def __init__(
        self,
        config: ValidationConfig,
        base: Base,
        encoder: ReferenceEncoder,
        kind: str,
        folder: Path,
        clip: Clip | None = None,
        scheduler: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        for name in ("validation_image", "validation_prompt", "validation_scale"):
            if not getattr(config, name):
                raise TrainingError(f"{name} is empty: give at least one, or no validation.")
        self.folder, self.clip = folder, clip
        self.prompts, self.weights = config.validation_prompt, config.validation_scale
        self._references = _opened(config.validation_image, encoder)
        rows = range(len(self._references)), range(len(self.prompts))
        self._cells = list(itertools.starmap(_Cell, itertools.product(*rows, self.weights)))
        steps, guidance = config.validation_num_inference_steps, config.validation_guidance_scale
        self._sampler = Sampler(
            base, SamplingOptions(steps, guidance, size, batch=BATCH), scheduler
        )
        self._text = encode_text(base, self.prompts)
        self._features, self._zero = encode_images(encoder, self._references, kind)
        if clip is not None:
            self._reference_embeds = clip.images(self._references)
            self._prompt_embeds = clip.texts(self.prompts)
        make_writable(folder)

    def path(self, step: int) -> Path:
        """Return the file of the sheet of `step`."""
        return self.folder / f"step-{step:06d}.png"

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
                parts = (mine[start : start + BATCH] for start in range(0, len(mine), BATCH))
                found = [x for part in parts for x in self._draw(adapter, part)]
            drawn = sorted(itertools.starmap(_Drawn, gather_object(found)), key=lambda x: x.cell)
        values = self._curves(drawn)
        accelerator.log(values, step=step)
        if accelerator.is_main_process:
            sheet = self._sheet([x.image for x in drawn], values, step)
            path = self.path(step)
            try:
                with atomic(path) as temporary:
                    sheet.save(temporary, format="PNG")
            except OSError as error:  # a full disk must not end a training
                logger.error("The contact sheet '%s' could not be written: %s", path, error)
            _log_sheet(sheet, accelerator, step)
        return values

    def _draw(self, adapter: IPAdapter, numbers: Sequence[int]) -> list[_Drawn]:
        cells = [self._cells[number] for number in numbers]
        references, prompts = [x.reference for x in cells], [x.prompt for x in cells]
        asked = Prompts(
            text=self._text[prompts],
            features=self._features[references],
            zero=self._zero,
            weights=[x.weight for x in cells],
            seeds=[SEED] * len(cells),
        )
        try:
            images = self._sampler.draw(adapter, asked)
        except NotFinite as error:
            logger.error("Validation: %s", error)
            return [_Drawn(number, None, {}) for number in numbers]
        scores: list[dict[str, float]] = [{} for _ in cells]
        if self.clip is not None:
            embeds = self.clip.images(images)
            like = clip_i(embeds, self._reference_embeds[references]).tolist()
            true = clip_t(embeds, self._prompt_embeds[prompts]).tolist()
            for cell, found, i, t in zip(cells, scores, like, true, strict=True):
                found["clip_i"] = i
                if self.prompts[cell.prompt]:  # else there is no text to be true to
                    found["clip_t"] = t
        return list(map(_Drawn, numbers, images, scores))

    def _curves(self, drawn: Sequence[_Drawn]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, weight in itertools.product(SCORES, self.weights):
            alike = [x.scores for x in drawn if self._cells[x.cell].weight == weight]
            if scores := [found[name] for found in alike if name in found]:
                values[_curve(name, weight)] = fmean(scores)
        return values

    def _sheet(
        self, images: Sequence[Image.Image | None], values: Mapping[str, float], step: int
    ) -> Image.Image:
        columns = [Column("reference")]
        for weight in self.weights:
            scores = [
                f"{label} {values[_curve(name, weight)]:.3f}"
                for name, label in SCORES.items()
                if _curve(name, weight) in values
            ]
            columns.append(Column(f"weight {weight:g}", " · ".join(scores)))
        rows, wide = [], len(self.weights)
        for start in range(0, len(images), wide):
            reference, prompt, _ = self._cells[start]
            text = self.prompts[prompt]
            shown = [self._references[reference], *images[start : start + wide]]
            rows.append(Row(f'"{text}"' if text else "image only", shown))
        return contact_sheet(rows, columns, title=f"step {step}")


def _curve(name: str, weight: float) -> str:
    return f"validation/{name}/weight_{weight:g}"


def _opened(paths: Sequence[str], encoder: ReferenceEncoder) -> list[Image.Image]:
    images, failed = [], []
    for path in paths:
        try:
            images.append(open_image(Path(path)))
            encoder.preprocess(images[-1])  # a face encoder wants a face
        except BrokenImageError as error:
            failed.append(f"'{path}' ({error})")
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(paths)} images in validation_image cannot be used: "
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


@torch.no_grad()
def validation_loss(batches: Iterable[Batch], loss: Callable[[Batch], Tensor]) -> float:
    """Return the mean loss of all samples that can be read, with nothing dropped.

    `batches` are this process's, `loss` gives a batch's mean; every process calls this, and all
    get the same. What is random of a sample comes with its batch: measured again, only `loss` has
    changed. NaN if no sample can be read.
    """
    total, samples = 0.0, 0
    with preserved_rng_state():
        for batch in batches:
            kept = {name: torch.zeros_like(batch[name]) for name in ("drop_image", "drop_text")}
            weight = batch["weight"]
            total += loss({**batch, **kept}).item() * len(weight)
            samples += int((weight > 0).sum())
        parts = gather_object([(total, samples)])
    totals, counts = zip(*parts, strict=True)
    return sum(totals) / sum(counts) if any(counts) else float("nan")
