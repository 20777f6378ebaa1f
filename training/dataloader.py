"""Where a run's batches come from: a cache, rows of images, or a stream of shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .caching.dataset import CachedDataset
from .config import DataConfig, FaceConfig, TrainConfig
from .data.buckets import Buckets, bucket_sizes, by_aspect, square
from .data.dataset import Examples, RawDataset, loader
from .data.randomness import NoiseSettings
from .data.sampler import RankBatchSampler
from .data.sources import Columns, Source, open_source
from .data.webdataset import ShardReader, StreamDataset, expand_shards, is_stream
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
    them. `left_out`: pictures known not to be among the rows, with the reason.
    """

    batches: Iterable[Batch]
    dropped: DroppedConditions
    encode: Callable[[Batch], Batch]
    raw: bool
    fingerprint: str
    size: tuple[int, int]
    left_out: Sequence[str] = ()


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
    if is_stream(config.train_data_dir):
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
        batches, order = _batches(dataset, config, position)
        fingerprint = f"{source.fingerprint} {order}"
    return TrainingData(
        batches, encoders.dropped(), encoders.encode, True, fingerprint, buckets.sizes[0]
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
    looked_at = {"dataloader_num_workers"}
    if config.resolution in sizes[0]:
        looked_at.add("resolution")
    given = (field for field in fields(DataConfig) if getattr(config, field.name) != field.default)
    if ignored := [field.name for field in given if field.name not in looked_at]:
        logger.warning(
            "%s: not looked at, the cache '%s' has its own",
            *(", ".join(ignored), config.feature_cache_dir),
        )
    batches, order = _batches(dataset, config, position)
    return TrainingData(
        batches,
        dataset.dropped(),
        encode=lambda batch: batch,
        raw=False,
        fingerprint=f"{dataset.manifest.parts['data']} {order}",
        size=sizes[0],
        left_out=dataset.broken,
    )


def _batches(
    dataset: RawDataset | CachedDataset, config: TrainConfig, position: Position
) -> tuple[Iterable[Batch], str]:
    order = dataset.buckets.sampler(len(dataset), position.batch, config.seed)
    sampler = RankBatchSampler(order, position.rank, position.world, position.step)
    return loader(dataset, sampler, config.dataloader_num_workers), order.fingerprint
