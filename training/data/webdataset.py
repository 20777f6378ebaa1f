"""Endless batches out of WebDataset shards, the same for any number of workers.

A run must give the same batches whatever reads them and go on exactly where it stopped, but a tar
file can only be read from its beginning. So each process has eight *lanes*: readers that take
shards of their own and fill batches of their own. Batch k of the process comes from lane k mod 8,
whichever worker process happens to serve that lane, and a resumed run finds its place in each.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from ip_adapter_core.files.atomic import atomic

from .. import fingerprints
from ..errors import TrainingError
from .buckets import Buckets, nearest
from .dataset import Examples, collate
from .face_embedding import MISSING, face_embedding
from .image import BrokenImageError, upright_size
from .randomness import counted
from .sources import PROBED, USUAL, Columns, Record

LANES = 8  # of each process; the number of workers is a divisor of it
BUFFER = 128  # compressed samples that each lane shuffles: 1,024 in a process
ENDINGS = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
PEEKED = 3  # unreadable shards in a row that are taken for a wrong address

logger = logging.getLogger(__name__)


# Shards and what they hold.


def is_stream(data: str | os.PathLike[str]) -> bool:
    """Return whether `data` names WebDataset shards: `….tar`, a pattern, a URL or a folder."""
    text = os.fspath(data)
    path = Path(text).expanduser()
    if path.is_dir():
        return any(path.glob("*.tar")) and not any(path.glob("metadata.*"))
    return "://" in text or text.startswith("pipe:") or text.endswith(ENDINGS)


def expand_shards(data: str | os.PathLike[str]) -> tuple[str, ...]:
    """Expand braces (`{000..099}`), `*` and folders. Raises TrainingError for missing ones."""
    text = os.fspath(data)
    if "://" in text or text.startswith("pipe:"):
        return tuple(braceexpand.braceexpand(text))
    if Path(text).expanduser().is_dir():
        text = os.path.join(glob.escape(text), "*.tar")
    found: list[str] = []
    missing: list[str] = []
    for pattern in braceexpand.braceexpand(os.path.expanduser(text)):
        there = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        found += there
        missing += [] if there else [pattern]
    if missing:
        more = ", …" if len(missing) > 5 else ""
        raise TrainingError(
            f"{len(missing)} of {len(found) + len(missing)} shards of '{data}' do not exist: "
            f"{', '.join(missing[:5])}{more}. Correct the pattern."
        )
    return tuple(found)


@dataclass(frozen=True)
class ShardReader:
    """Reads shards; `columns.text` names the key of captions in `.json` files."""

    columns: Columns = field(default_factory=Columns)
    default_caption: str | None = None

    def records(self, shard: str) -> Generator[Record]:
        """Yield a shard's samples, and a broken record if it cannot be read to its end."""
        try:
            with gopen(shard) as stream:
                source = [{"url": shard, "stream": stream}]
                for sample in group_by_keys(tar_file_expander(source)):
                    yield self._record(sample, shard)
        except Exception as error:  # of tarfile, zlib, the network …
            # webdataset appends the stream to an error's message and arguments.
            found = getattr(error, "strerror", None) or next(iter(error.args), type(error).__name__)
            reason = str(found).partition(" @ ")[0]
            yield Record(shard, b"", "", broken=f"the rest of this shard is lost ({reason})")

    def check(self, shards: Sequence[str]) -> None:
        """Raise TrainingError unless the first shards can be read and hold images and captions."""
        broken = []
        for shard in shards[:PEEKED]:
            with closing(self.records(shard)) as records:  # a picture may well show nobody
                peeked = [*islice(records, PROBED if self.columns.face else 1)]
            first = next((x for x in peeked if not x.broken), peeked[0] if peeked else None)
            if first is not None and first.name != shard:
                if not first.broken:
                    return
                raise TrainingError(
                    f"'{shard}' cannot be trained on: its first sample {first.name} is without "
                    f"what is needed ({first.broken})."
                )
            broken.append(f"'{shard}': {first.broken if first else 'it is empty'}")
        raise TrainingError(
            f"None of the first {len(broken)} of {len(shards)} shards can be read: "
            f"{'; '.join(broken)}. Expected tar files of a picture and a .txt or .json a sample."
        )

    def _record(self, sample: dict[str, Any], shard: str) -> Record:
        files = {key: value for key, value in sample.items() if not key.startswith("__")}
        references = [key for key in files if key.startswith("reference.") and _is_image(key)]
        images = [key for key in files if _is_image(key) and key not in references]
        name = f"{sample['__key__']} in {os.path.basename(shard)}"
        texts, wrong = [""], ""
        try:
            if found := self._texts(files):
                texts = found
            elif self.default_caption is not None:
                texts = [self.default_caption]
            else:
                wrong = f"no caption (.txt or .json) among its files {', '.join(files)}"
        except ValueError as error:
            wrong = f"its caption cannot be read: {error}"
        face = None
        if asked := self.columns.face:
            face = self._face(files, asked)
            try:
                face_embedding(face)
            except BrokenImageError as error:
                known = ", ".join(files)
                wrong = f"{error}, in {asked}.npy or as {asked} in the .json, among {known}"
        if not images:
            wrong = f"no picture among its files {', '.join(files)}"
        return Record(
            name=name,
            image=files[images[0]] if images else b"",
            text=texts[0],
            reference=files[references[0]] if references else None,
            broken=wrong,
            face=face,
            other_texts=tuple(texts[1:]),
        )

    @staticmethod
    def _face(files: dict[str, bytes], name: str) -> Any:
        npy = files.get(f"{name}.npy".lower())  # webdataset's keys are in small letters
        if npy is not None or "json" not in files:
            return npy or MISSING
        with suppress(ValueError, AttributeError):  # told of the caption
            return json.loads(files["json"]).get(name) or MISSING
        return MISSING

    def _texts(self, files: dict[str, bytes]) -> list[str]:
        asked = self.columns.text
        if "txt" in files and asked is None:
            text = files["txt"].decode("utf-8-sig").strip()
            return [text] if text else []
        if "json" in files:
            found = json.loads(files["json"])
            for name in [asked] if asked else str(USUAL.text).split():
                given = found.get(name) if isinstance(found, dict) else None
                texts = given if isinstance(given, list) else [given]
                if any(isinstance(text, str) for text in texts):
                    stripped = (text.strip() for text in texts if isinstance(text, str))
                    return [text for text in stripped if text]
        return []


def _is_image(key: str) -> bool:
    return key.rpartition(".")[2] in IMAGES


# Lanes: which samples each reads, and the batches that it makes of them.


class Unit(NamedTuple):
    """Every `parts`-th sample of a shard from `part` on; the whole shard if parts is 1."""

    shard: str
    part: int
    parts: int


@dataclass(frozen=True)
class LaneSampler:
    """Which samples each of `lanes` lanes reads in an epoch.

    Shards, or parts of shards if these are too few. In an epoch each sample belongs to one lane.
    """

    shards: tuple[str, ...]
    lanes: int
    seed: int

    @property
    def parts(self) -> int:
        """How many lanes share a shard."""
        return -(-self.lanes // len(self.shards))

    def units(self, epoch: int, lane: int) -> list[Unit]:
        """Return what a lane reads in an epoch, in this order; dealt anew in each."""
        units = [Unit(s, part, self.parts) for s in self.shards for part in range(self.parts)]
        order = counted(self.seed, epoch).permutation(len(units))
        return [units[place] for place in order[lane :: self.lanes]]


class BucketCounts:
    """How many samples of each bucket a unit holds, learnt while it is read and kept in a folder.

    With them a resumed run passes over whole epochs without reading.
    """

    def __init__(self, folder: Path | None, buckets: Buckets) -> None:
        self._folder, self._sizes = folder, buckets.sizes

    def get(self, unit: Unit) -> np.ndarray | None:
        """Return a unit's counts (buckets,), or None if they are not known."""
        with suppress(OSError, ValueError, TypeError):
            return np.array(json.loads(self._path(unit).read_text()), dtype=np.int64)
        return None

    def put(self, unit: Unit, counts: np.ndarray) -> None:
        """Keep a unit's counts."""
        with suppress(OSError, TypeError):  # only time is lost without it
            path = self._path(unit)
            path.parent.mkdir(exist_ok=True)
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(counts.tolist()))

    def _path(self, unit: Unit) -> Path:
        state: tuple[int, ...] = ()
        with suppress(OSError):  # a URL
            stat = os.stat(unit.shard)
            state = stat.st_size, stat.st_mtime_ns
        name = fingerprints.of_repr((tuple(unit), state, self._sizes))
        return self._folder / f"{name}.count.json"  # type: ignore[operator]  # TypeError: no folder


RecordBatch = tuple[list[Record], tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Lane:
    """One reader's batches of `batch` records and their `(height, width)`, epoch after epoch.

    What fills no batch is left out of its epoch.
    """

    number: int
    sampler: LaneSampler
    reader: ShardReader
    buckets: Buckets
    batch: int
    counts: BucketCounts

    def batches(self, skip: int) -> Iterator[RecordBatch]:
        """From the batch after the first `skip` ones; what is skipped is read, not decoded.

        Raises TrainingError if every shard was tried and nothing to train on came of them.
        """
        tried: set[Unit] = set()
        for epoch in count():
            units = self.sampler.units(epoch, self.number)
            tried.update(units)
            known = self._known_batches(units)
            if known and known <= skip:
                skip -= known
                tried.clear()
                continue
            for records, size in self._epoch(epoch, units):
                if any(not record.broken for record in records):
                    tried.clear()
                if skip:
                    skip -= 1
                else:
                    yield records, size
            shards, lanes = self.sampler.shards, self.sampler.lanes
            if len(tried) == len(shards) * self.sampler.parts:
                raise TrainingError(
                    f"No batch of {self.batch} readable samples came of {len(shards)} shards, read "
                    f"by {lanes} readers: '{shards[0]}', … Look for broken shards in the log above."
                    f" If there are none, the shards hold too few samples, and {self.batch * lanes}"
                    " would be enough if they were of one shape: give more, or a smaller "
                    "train_batch_size."
                )

    def _known_batches(self, units: Sequence[Unit]) -> int:
        """How many batches an epoch of these units gives; 0 if that is not known."""
        known = [self.counts.get(unit) for unit in units]
        if any(counts is None for counts in known):
            return 0
        return int((np.sum(known, axis=0) // self.batch).sum())  # type: ignore[arg-type]

    def _epoch(self, epoch: int, units: Sequence[Unit]) -> Iterator[RecordBatch]:
        chance = counted(self.sampler.seed, epoch, self.number)
        waiting: dict[int, list[Record]] = {}
        for record, bucket in _shuffled(self._read(units), chance):
            waiting.setdefault(bucket, []).append(record)
            if len(waiting[bucket]) == self.batch:
                yield waiting.pop(bucket), self.buckets.sizes[bucket]

    def _read(self, units: Sequence[Unit]) -> Iterator[tuple[Record, int]]:
        for unit in units:
            counts, whole = np.zeros(len(self.buckets.sizes), np.int64), True
            for place, record in enumerate(self.reader.records(unit.shard)):
                whole = whole and record.name != unit.shard
                if place % unit.parts == unit.part:
                    bucket = self._bucket(record)
                    counts[bucket] += 1
                    yield record, bucket
            if whole:
                self.counts.put(unit, counts)

    def _bucket(self, record: Record) -> int:
        if len(self.buckets.sizes) > 1 and not record.broken:
            with suppress(BrokenImageError):
                size = np.array([upright_size(record.image)])
                return int(nearest(self.buckets.sizes, size)[0])
        return 0


def _shuffled(items: Iterator[Any], chance: np.random.RandomState) -> Iterator[Any]:
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < BUFFER:
            buffer.append(item)
        else:
            place = chance.randint(BUFFER)
            buffer[place], item = item, buffer[place]
            yield item
    for place in chance.permutation(len(buffer)):
        yield buffer[place]


class StreamDataset(IterableDataset[dict[str, Any]]):
    """This process's collated batches from `first_step` on, without end.

    `batch` is the global one; `buckets.of_row` is not used: the images' headers decide.
    `folder` keeps what was learnt about the shards for resuming. The order follows from seed,
    shards, batch and `world`. Raises TrainingError if the shards cannot be read or hold no
    captions.
    """

    def __init__(
        self,
        shards: Sequence[str],
        reader: ShardReader,
        examples: Examples,
        buckets: Buckets,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        first_step: int = 0,
        folder: Path | None = None,
    ) -> None:
        if batch % world:
            raise ValueError(f"A global batch of {batch} cannot be split over {world} processes.")
        reader.check(shards)
        self._reader, self._examples, self._buckets = reader, examples, buckets
        self._batch, self._rank, self._share = batch, rank, batch // world
        self._first_step = first_step
        self._sampler = LaneSampler(tuple(shards), world * LANES, seed)
        self._counts = BucketCounts(folder, buckets)
        if self._sampler.parts > 1 and not rank:
            logger.warning(
                "%d shards for %d readers (%d processes): each shard is read %d times an epoch, "
                "each time for other samples; more and smaller shards would be faster",
                *(len(shards), self._sampler.lanes, world, self._sampler.parts),
            )

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the order depends on but the shards' contents."""
        names = [os.path.basename(shard) for shard in self._sampler.shards]
        state = names, self._sampler.lanes, self._sampler.seed, self._batch, self._buckets.sizes
        return fingerprints.of_repr(("philox", state, self._reader, BUFFER))

    @staticmethod
    def max_workers(asked: int) -> int:
        """Return the largest number of workers up to `asked` that can share the lanes."""
        return max((n for n in range(1, asked + 1) if LANES % n == 0), default=0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if LANES % workers:
            raise ValueError(f"{workers} workers cannot share {LANES} lanes; see max_workers.")
        lanes: dict[int, Iterator[RecordBatch]] = {}
        for step in count(self._first_step + worker, workers):
            lane = step % LANES
            if lane not in lanes:
                lanes[lane] = self._lane(lane)
            records, size = next(lanes[lane])
            first = step * self._batch + self._rank * self._share
            yield collate([self._examples(r, first + i, size) for i, r in enumerate(records)])

    def _lane(self, lane: int) -> Iterator[RecordBatch]:
        number = self._rank * LANES + lane
        reader = Lane(number, self._sampler, self._reader, self._buckets, self._share, self._counts)
        return reader.batches(skip=len(range(lane, self._first_step, LANES)))
