"""From rows to batches of tensors: decoded, fitted, tokenised, with each sample's draws."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .buckets import LATENT_STEP, Buckets
from .face_embedding import face_embedding
from .image import BrokenImageError, fit, open_image
from .randomness import NoiseSettings, SampleNoise, sample_caption, sample_noise
from .sources import Record, Source

Example = dict[str, Any]
Tokenise = Callable[[str], tuple[Tensor, ...]]
PreprocessReference = Callable[[Image.Image], Tensor]


class Examples:
    """Makes the tensors of one sample.

    `tokenise` gives (77,) int64 for each tokenizer; `preprocess_reference` the image encoder's
    normalised pixels (3, s, s), or a face's embedding (512,). It may refuse an image.
    """

    def __init__(
        self,
        tokenise: Tokenise,
        preprocess_reference: PreprocessReference,
        draw_settings: NoiseSettings,
    ) -> None:
        self._tokenise, self._preprocess = tokenise, preprocess_reference
        self._draw_settings = draw_settings
        shape = getattr(preprocess_reference, "shape", None)  # of one that refuses images
        if shape is None:
            shape = preprocess_reference(Image.new("RGB", (64, 64))).shape
        self._no_reference = torch.zeros(shape)

    def __call__(self, record: Record, number: int, size: tuple[int, int]) -> Example:
        """Sample `number` of the run, fitted to `(height, width)` pixels.

        `pixels` (3, H, W) in -1..1; `reference` (3, s, s) or (512,); `tokens`; `time_ids` (6,)
        original height and width, top and left of the crop in the resized image, target height
        and width; `draws`; `weight` 1; `broken` empty. An image that cannot be read gives zeros of
        the same shapes, weight 0, and in `broken` its name and what is wrong.
        """
        height, width = size
        latent_size = height // LATENT_STEP, width // LATENT_STEP
        texts = record.texts
        text = texts[sample_caption(self._draw_settings.seed, number, len(texts))]
        example: Example = {
            "tokens": self._tokenise(text),
            "draws": sample_noise(self._draw_settings, number, latent_size),
        }
        try:
            if record.broken:
                raise BrokenImageError(record.broken)
            image = open_image(record.image)
            reference = self._reference(record, image)
        except BrokenImageError as error:
            return example | {
                "pixels": torch.zeros(3, height, width),
                "reference": self._no_reference.clone(),
                "time_ids": torch.zeros(6),
                "weight": 0.0,
                "broken": f"{record.name}: {error}",
            }
        fitted = fit(image, size)
        ids = (image.height, image.width, fitted.top, fitted.left, height, width)
        return example | {
            "pixels": fitted.pixels,
            "reference": reference,
            "time_ids": torch.tensor(ids, dtype=torch.float32),
            "weight": 1.0,
            "broken": "",
        }

    def _reference(self, record: Record, image: Image.Image) -> Tensor:
        if record.face is not None:
            return face_embedding(record.face)
        if record.reference is None:
            return self._preprocess(image)
        try:
            return self._preprocess(open_image(record.reference))
        except BrokenImageError as error:
            raise BrokenImageError(f"its reference picture: {error}") from error


class RawDataset(Dataset[Example]):
    """Examples of a source's rows, by (number, row); see `Examples`."""

    def __init__(
        self,
        source: Source,
        tokenise: Tokenise,
        preprocess_reference: PreprocessReference,
        buckets: Buckets,
        draw_settings: NoiseSettings,
    ) -> None:
        self.source, self.buckets, self._tokenise = source, buckets, tokenise
        self._examples = Examples(tokenise, preprocess_reference, draw_settings)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: tuple[int, int]) -> Example:
        number, row = index
        return self._example(self.source[row], number, row)

    def _example(self, record: Record, number: int, row: int) -> Example:
        return self._examples(record, number, self.buckets.size_of(row))


class EveryCaption(RawDataset):
    """Examples with the `tokens` (captions, 77) of all `captions` of a row."""

    def _example(self, record: Record, number: int, row: int) -> Example:
        tokens = zip(*map(self._tokenise, record.texts), strict=True)
        return super()._example(record, number, row) | {
            "tokens": tuple(torch.stack(one) for one in tokens),
            "captions": len(record.texts),
        }


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Stack examples; `tokens` are those of all captions, one below the other.

    `draws` is flattened into its fields, and `broken` has the non-empty ones.
    """
    batch: dict[str, Any] = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if key == "broken":
            batch[key] = [value for value in values if value]
        elif key == "tokens":
            rows = zip(*values, strict=True)
            batch[key] = tuple(torch.cat([ids.view(-1, ids.shape[-1]) for ids in x]) for x in rows)
        elif key == "draws":
            batch |= {
                name: _stack([getattr(v, name) for v in values]) for name in SampleNoise._fields
            }
        else:
            batch[key] = _stack(values)
    return batch


def _stack(values: list[Any]) -> Tensor:
    return torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)


def loader(
    dataset: Dataset[Any],
    batches: Iterable[list[tuple[int, int]]] | None,
    workers: int,
    prefetch: int = 2,
) -> DataLoader[Any]:
    """Return a loader of collated batches, read ahead by `workers` processes (0: in this one).

    `batches` says which samples; None for a stream, which makes its batches itself. What comes
    does not depend on `workers`. Each worker keeps `prefetch` batches ready.
    """
    if hasattr(dataset, "max_workers"):
        workers = dataset.max_workers(workers)
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if workers:
        options |= {
            "prefetch_factor": prefetch,
            "persistent_workers": True,
            "worker_init_fn": partial(begin_worker, _exiting()),
        }
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, batch_size=None, **options)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **options)


def begin_worker(exiting: Any, worker: int) -> None:
    """Set up a worker process (torch itself limits it to one thread)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else a warning for each: it was forked

    def end_with_training(number: int, frame: FrameType | None) -> None:
        if exiting.value:
            os._exit(0)

    # Schedulers and terminals signal every process of a job: a worker that died of it would take
    # the training process along before that has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_with_training)


@cache
def _exiting() -> Any:
    """Return a flag that is true, in the workers too, as soon as this process ends."""
    flag = RawValue("b", 0)
    atexit.register(setattr, flag, "value", 1)  # runs before multiprocessing ends the workers
    return flag
