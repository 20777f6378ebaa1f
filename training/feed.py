"""Where a run's batches come from: a cache, rows of pictures, or a stream of shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .caching.dataset import CachedDataset
from .config import Settings
from .data.buckets import Buckets, bucket_sizes, by_aspect, square
from .data.dataset import Examples, RawDataset, loader
from .data.randomness import NoiseSettings
from .data.sampler import RankBatchSampler
from .data.sources import Columns, open_source
from .data.webdataset import ShardReader, StreamDataset, expand_shards, is_stream
from .loss import Batch, Dropped
from .models.frozen import FrozenEncoders

DECIDED_BY_CACHE = ("data", "image_root", "caption_column", "default_caption", "size", "buckets")
KEPT_HERE = "data"  # what was found out about the data, in a folder of the run's
_DEFAULTS = {field.name: field.default for field in fields(Settings)}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """`batches` of this process, without end. `encode` makes of one what `recipe` reads; it needs
    the frozen encoders if `raw`. `fingerprint`: of the rows and their order. `size`: height and
    width of a square picture among them."""

    batches: Iterable[Batch]
    dropped: Dropped
    encode: Callable[[Batch], Batch]
    raw: bool
    fingerprint: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where in a run, and as which of its processes, to begin: `step` counts micro-steps, `batch`
    is the global one."""

    rank: int
    world: int
    batch: int
    step: int

    @classmethod
    def of(cls, settings: Settings, accelerator: Accelerator, done: int) -> Place:
        world = accelerator.num_processes
        step = done * settings.accumulation
        return cls(accelerator.process_index, world, settings.batch_size * world, step)


def open_feed(settings: Settings, encoders: FrozenEncoders, timesteps: int, place: Place) -> Feed:
    """Raises TrainingError for data or a cache that cannot be trained on."""
    draws = NoiseSettings(
        seed=settings.seed,
        drop_image=settings.drop_image,
        drop_text=settings.drop_text,
        drop_both=settings.drop_both,
        timesteps=timesteps,
        noise_offset=settings.noise_offset,
    )
    if settings.cache:
        return _cached(settings, encoders, draws, place)
    assert settings.data is not None  # as the settings see to
    if is_stream(settings.data):
        return _stream(settings, encoders, draws, place)
    return _rows(settings, encoders, draws, place)


def _cached(
    settings: Settings, encoders: FrozenEncoders, draws: NoiseSettings, place: Place
) -> Feed:
    assert settings.cache is not None
    given = [name for name in DECIDED_BY_CACHE if getattr(settings, name) != _DEFAULTS[name]]
    dataset = CachedDataset(
        settings.cache, encoders.kind, draws, encoders.fingerprints, encoders.names
    )
    sizes = dataset.manifest.sizes
    if settings.size in sizes[0]:
        given = [name for name in given if name != "size"]
    if given:
        logger.warning(
            "%s: not looked at, the cache '%s' has its own", ", ".join(given), settings.cache
        )
    batches, order = _batches(dataset, dataset.buckets, len(dataset), settings, place)
    data = dataset.manifest.parts["data"]
    return Feed(batches, dataset.dropped(), lambda batch: batch, False, f"{data} {order}", sizes[0])


def _rows(settings: Settings, encoders: FrozenEncoders, draws: NoiseSettings, place: Place) -> Feed:
    assert settings.data is not None
    source = open_source(
        settings.data,
        image_root=settings.image_root,
        columns=Columns(text=settings.caption_column),
        default_caption=settings.default_caption,
    )
    size, kept = settings.size, Path(settings.out, KEPT_HERE)
    buckets = by_aspect(source, size, kept) if settings.buckets else square(size)
    preprocess = encoders.image_encoder.preprocess
    dataset = RawDataset(source, encoders.tokenise, preprocess, buckets, draws)
    batches, order = _batches(dataset, buckets, len(source), settings, place)
    rows = f"{source.fingerprint} {order}"
    return Feed(batches, encoders.dropped(), encoders.encode, True, rows, buckets.sizes[0])


def _stream(
    settings: Settings, encoders: FrozenEncoders, draws: NoiseSettings, place: Place
) -> Feed:
    assert settings.data is not None
    size = settings.size
    buckets = Buckets(bucket_sizes(size)) if settings.buckets else square(size)
    dataset = StreamDataset(
        expand_shards(settings.data),
        ShardReader(Columns(text=settings.caption_column), settings.default_caption),
        Examples(encoders.tokenise, encoders.image_encoder.preprocess, draws),
        buckets,
        batch=place.batch,
        seed=settings.seed,
        rank=place.rank,
        world=place.world,
        first_step=place.step,
        folder=Path(settings.out, KEPT_HERE),
    )
    batches = loader(dataset, None, settings.workers)
    return Feed(
        batches, encoders.dropped(), encoders.encode, True, dataset.fingerprint, buckets.sizes[0]
    )


def _batches(
    dataset: Any, buckets: Buckets, rows: int, settings: Settings, place: Place
) -> tuple[Iterable[Batch], str]:
    order = buckets.sampler(rows, place.batch, settings.seed)
    sampler = RankBatchSampler(order, place.rank, place.world, place.step)
    return loader(dataset, sampler, settings.workers), order.fingerprint
