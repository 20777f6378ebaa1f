"""Where a run's batches come from: a cache, rows of images, or a stream of shards."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .caching.dataset import CachedDataset
from .config import DataConfig, FaceConfig, TrainConfig
from .data.buckets import Buckets, bucket_sizes, by_aspect, square
from .data.columns import Column, held_out_rows, read_column
from .data.dataset import Examples, RawDataset, loader
from .data.randomness import NoiseSettings
from .data.sampler import RankBatchSampler
from .data.sources import Columns, Source, open_source
from .data.webdataset import ShardReader, StreamDataset, expand_shards, is_stream
from .errors import TrainingError
from .loss import Batch, DroppedConditions
from .models.frozen import FrozenEncoders

FOLDER = "data"  # of a run: what was found out about its data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where in a run, and as which of its processes, to begin.

    `step` counts forward passes, `batch` is the global batch of one.
    """

    rank: int
    world: int
    batch: int
    step: int


@dataclass(frozen=True)
class TrainingData:
    """`batches` of this process, without end.

    `encode` makes of one what `DiffusionLoss` reads; it needs the frozen encoders if `raw`.
    `fingerprint`: of the rows and their order. `size`: height and width of a square image among
    them. `left_out`: pictures known not to be among the rows, with the reason. `held_out` gives
    this process's batches of the rows that are never trained on, if any.
    """

    batches: Iterable[Batch]
    dropped: DroppedConditions
    encode: Callable[[Batch], Batch]
    raw: bool
    fingerprint: str
    size: tuple[int, int]
    left_out: Sequence[str] = ()
    held_out: Callable[[], Iterable[Batch]] | None = None


def open_data(
    config: TrainConfig, encoders: FrozenEncoders, timesteps: int, position: Position
) -> TrainingData:
    """Open what the config names. Raises TrainingError for what cannot be trained on."""
    draws = NoiseSettings(
        seed=config.seed,
        drop_image=config.i_drop_rate,
        drop_text=config.t_drop_rate,
        drop_both=config.ti_drop_rate,
        timesteps=timesteps,
        noise_offset=config.noise_offset,
    )
    if config.feature_cache_dir:
        return _cached(config, encoders, draws, position)
    assert config.train_data_dir is not None  # as the config sees to
    folder = Path(config.output_dir, FOLDER)
    preprocess = encoders.image_encoder.preprocess
    dataset: Any
    held_out = None
    if is_stream(config.train_data_dir):
        if config.columns:
            raise TrainingError(
                f"'{config.train_data_dir}' are WebDataset shards, which are streamed: what their "
                f"column {' and '.join(config.columns)} says of all samples is not known. Leave "
                "validation_split_column and balance_column out, or unpack the shards into a "
                "folder of images with a metadata.jsonl that has the column."
            )
        size = config.resolution
        buckets = Buckets(bucket_sizes(size)) if config.enable_bucket else square(size)
        dataset = StreamDataset(
            expand_shards(config.train_data_dir),
            ShardReader(_columns(config), config.default_caption),
            Examples(encoders.tokenise, preprocess, draws),
            buckets,
            batch=position.batch,
            seed=config.seed,
            rank=position.rank,
            world=position.world,
            first_step=position.step,
            folder=folder,
        )
        batches: Iterable[Batch] = loader(dataset, None, config.dataloader_num_workers)
        fingerprint = dataset.fingerprint
    else:
        source, buckets = open_rows(config, folder)
        dataset = RawDataset(source, encoders.tokenise, preprocess, buckets, draws)
        column = partial(read_column, config.train_data_dir)
        batches, order, held_out = _batches(dataset, column, config, position)
        fingerprint = f"{source.fingerprint} {order}"
    return TrainingData(
        batches,
        encoders.dropped(),
        encoders.encode,
        raw=True,
        fingerprint=fingerprint,
        size=buckets.sizes[0],
        held_out=held_out,
    )


def _columns(config: FaceConfig) -> Columns:
    return Columns(text=config.caption_column, face=config.face_embedding_column)


def open_rows(config: FaceConfig, folder: Path) -> tuple[Source, Buckets]:
    """Open rows of images, and put them into buckets; `folder` keeps the sizes of images."""
    assert config.train_data_dir is not None  # as the configs see to
    source = open_source(
        config.train_data_dir,
        image_root=config.data_root_path,
        columns=_columns(config),
        default_caption=config.default_caption,
    )
    size = config.resolution
    return source, by_aspect(source, size, folder) if config.enable_bucket else square(size)


def _cached(
    config: TrainConfig, encoders: FrozenEncoders, draws: NoiseSettings, position: Position
) -> TrainingData:
    assert config.feature_cache_dir is not None
    dataset = CachedDataset(
        config.feature_cache_dir, encoders.kind, draws, encoders.fingerprints, encoders.names
    )
    sizes = dataset.manifest.sizes
    looked_at = {"dataloader_num_workers", "validation_split_column", "balance_column"}
    if config.resolution in sizes[0]:
        looked_at.add("resolution")
    given = (field for field in fields(DataConfig) if getattr(config, field.name) != field.default)
    if ignored := [field.name for field in given if field.name not in looked_at]:
        logger.warning(
            "%s: not looked at, the cache '%s' has its own",
            *(", ".join(ignored), config.feature_cache_dir),
        )
    batches, order, held_out = _batches(dataset, dataset.column, config, position)
    return TrainingData(
        batches,
        dataset.dropped(),
        encode=lambda batch: batch,
        raw=False,
        fingerprint=f"{dataset.manifest.parts['data']} {order}",
        size=sizes[0],
        left_out=dataset.broken,
        held_out=held_out,
    )


def _batches(
    dataset: RawDataset | CachedDataset,
    column: Callable[[str], Column],
    config: TrainConfig,
    position: Position,
) -> tuple[Iterable[Batch], str, Callable[[], Iterable[Batch]] | None]:
    """Return the batches to train on, the fingerprint of their order, and the held-out ones."""
    held_out: np.ndarray | None = None
    held_out_batches = None
    if config.validation_split_column:
        split = column(config.validation_split_column)
        held_out = held_out_rows(split)
        logger.info("'%s' holds out %s", split.name, split.told(held_out))
        if not config.validation_steps:
            logger.warning("validation_steps is 0: the loss of the rows held out is not measured")
        held_out_batches = _held_out(dataset, np.flatnonzero(held_out), config, position)
    balanced: Column | None = None
    if config.balance_column:
        balanced = column(config.balance_column)
        trained = None if held_out is None else ~held_out
        logger.info("'%s' is balanced, rows by value: %s", balanced.name, balanced.told(trained))
    of_row = None if balanced is None else balanced.of_row
    order = dataset.buckets.sampler(len(dataset), position.batch, config.seed, held_out, of_row)
    sampler = RankBatchSampler(order, position.rank, position.world, position.step)
    batches = loader(dataset, sampler, config.dataloader_num_workers)
    return batches, order.fingerprint, held_out_batches


def _held_out(
    dataset: RawDataset | CachedDataset,
    rows: np.ndarray,
    config: TrainConfig,
    position: Position,
) -> Callable[[], Iterable[Batch]]:
    """Return what gives this process's share of the batches of `rows`, the same each time.

    A row's number is that of its sample too, so that it has the same noise however many processes
    there are.
    """
    batches = dataset.buckets.batches(rows, config.train_batch_size)
    mine = [
        [(row, row) for row in batch.tolist()]
        for batch in itertools.islice(batches, position.rank, None, position.world)
    ]
    workers = min(config.dataloader_num_workers, len(mine))
    return lambda: loader(dataset, mine, workers)
