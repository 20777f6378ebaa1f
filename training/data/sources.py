"""Rows of images and captions, by number, whatever they lie in; no image is decoded here.

Every kind of data becomes a `datasets.Dataset`, whose rows are read through a memory map: one that
`save_to_disk` wrote is read where it lies, lists and folders are written to Hugging Face's cache
folder once, and again when their files change.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    Sequence,
    Value,
    config,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from .. import fingerprints
from ..errors import TrainingError
from .face_embedding import MISSING, face_embedding, to_npy
from .image import BrokenImageError, ImageData
from .listings import (
    FIRST,
    Values,
    find_metadata,
    folder_state,
    missing,
    printable,
    read_folder,
    read_listing,
)

TEXTS = ("string", "large_string")
MARKS = ("state.json", "dataset_dict.json")  # of a folder that `save_to_disk` wrote
VERSION = 3  # of the rows that are written to the cache folder: another number makes them anew
PROBED = 16  # rows whose files are looked for before anything else
BLOCK = 4096  # rows in memory at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One row. `name` is for messages; `reference` a reference image other than the target.

    `text` is the caption, the first one where there are several; `other_texts` are the others.
    `broken` says what is known to be wrong with it before anything is decoded, or is empty. `face`
    is what `face_embedding` reads, None where no column of them is asked for.
    """

    name: str
    image: ImageData
    text: str
    reference: ImageData | None = None
    broken: str = ""
    face: Any = None
    other_texts: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All captions, at least one."""
        return self.text, *self.other_texts


@dataclass(frozen=True)
class Columns:
    """Names of columns, or None: the first of the usual names that is there.

    That of face embeddings has no usual name. What begins without it keeps its fingerprints.
    """

    image: str | None = None
    text: str | None = None
    reference: str | None = None
    face: str | None = field(default=None, repr=False)


USUAL = Columns(
    image="file_name image_file image file path",
    text="text caption prompt",
    reference="reference_file_name reference_file reference_image reference",
)
ROWS = Columns("image", "text", "reference")  # of what is written to the cache folder
_ROLES = {
    "image": "pictures",
    "text": "captions",
    "reference": "reference pictures",
    "face": "face embeddings",
}


def open_source(
    data: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    columns: Columns = Columns(),
    default_caption: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Open the rows of `data`: of which kind it is follows from what lies there.

    - a folder with `metadata.jsonl`, `.csv` or `.parquet` (Hugging Face's imagefolder), or such a
      file itself: `file_name` is relative to it, or to `image_root`;
    - a folder of images, folders in it included, with a `.txt` beside each;
    - a JSON file of the reference scripts: `[{"image_file": …, "text": …}]`;
    - a folder that `datasets.Dataset.save_to_disk` wrote (of a DatasetDict: `train`).

    A row's caption is a text, or a list of several. `default_caption` is the caption of images
    that have none. `cache_dir`: default Hugging Face's.

    Raises:
        TrainingError: Nothing usable lies there, or captions are missing.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise TrainingError(_not_found(path))
    root = Path(image_root).expanduser() if image_root else path
    if is_saved(path):
        dataset = load_saved(path)
        source = Source(dataset, dataset._fingerprint, columns, default_caption, root)
        source.check_faces(path)
        return source
    listing = find_metadata(path) if path.is_dir() else path
    if listing is None:
        if columns.face is not None:
            raise TrainingError(
                f"'{path}' is a folder of pictures without a list, so it has no column "
                f"'{columns.face}'. List them in a metadata.jsonl or .parquet with that column."
            )
        how = "Write the caption of a.jpg to a.txt beside it, or all to a metadata.jsonl"
        dataset = _through_cache(read_folder, path, folder_state(path), ROWS, cache_dir)
    else:
        how = f"Write captions to '{listing}'"
        root = root if image_root else listing.parent
        stat = listing.stat()
        first = next(read_listing(listing), None)
        if first is None:
            raise TrainingError(f"'{listing}' lists no pictures. Expected a row for each picture.")
        columns = pick_columns(columns, list(map(str, first)), f"'{listing}'", default_caption)
        state = f"{stat.st_size} {stat.st_mtime_ns}"
        dataset = _through_cache(read_listing, listing, state, columns, cache_dir)
    rows = replace(ROWS, face="face") if columns.face is not None else ROWS
    source = Source(dataset, _hash(dataset), rows, default_caption, root, how)
    source.check_files(path)
    source.check_faces(path)
    return source


class Source:
    """Rows of a `datasets.Dataset`, by number; `fingerprint` identifies them all.

    Its images are `datasets.Image`, encoded bytes, or paths relative to `root`. Raises
    TrainingError for columns of other kinds and missing captions; `how` says how to give these.
    """

    def __init__(
        self,
        dataset: Dataset,
        state: str,
        columns: Columns,
        default_caption: str | None,
        root: Path,
        how: str = "",
    ) -> None:
        where = f"'{root}'"
        if not len(dataset):
            raise TrainingError(f"{where} holds no rows. Expected a row for each picture.")
        names = dataset.column_names
        self._columns = columns = pick_columns(columns, names, where, default_caption)
        self._default_caption, self._root = default_caption, root
        self.fingerprint = fingerprints.of_repr((state, columns, default_caption))
        for column in filter(None, (columns.image, columns.reference)):
            _check_images(dataset.features[column], column, where)
        told = ("height", "width")
        kinds = (str(getattr(dataset.features.get(name), "dtype", "")) for name in told)
        self._sizes = told if all("int" in kind for kind in kinds) else ()
        # As Arrow, so that images stay encoded bytes.
        kept = [name for name in names if name in {*vars(columns).values(), *self._sizes}]
        self._rows = dataset.select_columns(kept).with_format("arrow")
        if columns.text is not None:
            self._check_captions(columns.text, where, how or f"Fill column '{columns.text}'")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Record:
        values: dict[str, Any] = self._rows[int(row)].to_pylist()[0]
        image, text, reference, face = (
            None if name is None else values[name] for name in vars(self._columns).values()
        )
        name = image if isinstance(image, str) else f"row {row}"
        if isinstance(image, dict) and image["path"]:
            name += f" ({os.path.basename(image['path'])})"
        given = [text] if isinstance(text, str) else text or []
        first, *others = _filled(given) or [self._default_caption or ""]
        return Record(
            name=name,
            image=self._image(image) or b"",
            text=first,
            reference=self._image(reference) or None,
            face=None if self._columns.face is None else self._image(face) or MISSING,
            other_texts=tuple(others),
        )

    def _image(self, value: Any) -> ImageData | None:
        if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
            value = value["bytes"] or value["path"]
        return self._root / value if value and isinstance(value, str) else value

    def sizes(self) -> np.ndarray:
        """Return height and width as the data tells them, (rows, 2) int32, 0 where it does not."""
        sizes = np.zeros((len(self), 2), np.int32)
        for place, name in enumerate(self._sizes):
            for start, chunk in self._chunks(name):
                known = pc.fill_null(chunk, 0).to_numpy().clip(0)
                sizes[start : start + len(chunk), place] = known
        return sizes

    @property
    def several_captions(self) -> bool:
        """Whether a row has more than one caption."""
        column = self._columns.text
        if column is None or getattr(self._rows.features[column], "dtype", None) in TEXTS:
            return False
        most = (pc.max(pc.list_value_length(chunk)).as_py() for _, chunk in self._chunks(column))
        return any(count is not None and count > 1 for count in most)

    def check_files(self, data: Path) -> None:
        """Raise TrainingError if none of some files, from the first row to the last, is there."""
        tried = [record.image for record in self._probed()]
        if not any(isinstance(image, Path) and image.is_file() for image in tried):
            raise TrainingError(
                f"None of {len(tried)} images that '{data}' lists, tried from its first to its "
                f"last row, is there: looked for '{tried[0]!s}'. File names are relative to "
                f"'{self._root}'; set data_root_path to the folder that they are relative to."
            )

    def check_faces(self, data: Path) -> None:
        """Raise TrainingError if no row has an embedding that all are asked to have."""
        if self._columns.face is None:
            return
        first = ""
        for record in itertools.chain(self._probed(), (self[row] for row in range(len(self)))):
            try:
                face_embedding(record.face)
                return
            except BrokenImageError as error:
                first = first or f"{record.name}: {error}"
        raise TrainingError(
            f"None of the {len(self)} rows of '{data}' has a face embedding to train on, the first "
            f"{first}. Give --face_embedding_column a column of them, or of names of .npy files."
        )

    def _probed(self) -> list[Record]:
        rows = np.unique(np.linspace(0, len(self) - 1, PROBED).astype(int))
        return [self[row] for row in rows]

    def _chunks(self, column: str) -> Iterator[tuple[int, Any]]:
        start = 0
        for chunk in self._rows.data.column(column).chunks:  # one at a time: copies stay small
            yield start, chunk
            start += len(chunk)

    def _check_captions(self, column: str, where: str, how: str) -> None:
        feature = self._rows.features[column]
        if getattr(getattr(feature, "feature", feature), "dtype", None) not in TEXTS:
            raise TrainingError(
                f"{where}: column '{column}' holds {feature!s}; expected a caption as a text in "
                "each row, or a list of them."
            )
        if self._default_caption is not None:
            return
        count = 0
        first: list[str] = []
        for start, chunk in self._chunks(column):
            places = np.flatnonzero(_blank(chunk))
            count += len(places)
            first += [self[start + int(place)].name for place in places[: FIRST - len(first)]]
        if count:
            more = ", …" if count > len(first) else ""
            raise TrainingError(
                f"{count} of {len(self)} pictures have no caption: {', '.join(first)}{more}. {how},"
                " leave these pictures out, or set a default caption (an empty one trains without "
                "text)."
            )


def _filled(texts: Iterable[Any]) -> list[str]:
    """Return those of a row's captions that say something, as texts that can be stored."""
    # Half of a surrogate pair, as cut-off emoji leave it, is none.
    given = (str(text) for text in texts if not missing(text))
    return [text.encode("utf-8", "replace").decode().strip() for text in given]


def _blank(captions: pa.Array) -> np.ndarray:
    """Which rows have no caption, `(rows,)` bool: of texts, or of lists of texts."""
    if pa.types.is_string(captions.type) or pa.types.is_large_string(captions.type):
        blank = pc.equal(pc.utf8_trim_whitespace(captions), "")
        return pc.fill_null(blank, True).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    found = np.ones(len(captions), bool)
    row_of_text = pc.list_parent_indices(captions).to_numpy()
    found[row_of_text[~_blank(pc.list_flatten(captions))]] = False
    return found


def _check_images(feature: Any, column: str, where: str) -> None:
    kind = getattr(feature, "dtype", type(feature).__name__)
    expected = "string", "large_string", "binary", "large_binary"
    if not isinstance(feature, Image) and kind not in expected:
        raise TrainingError(
            f"{where}: column '{column}' holds {kind}; expected pictures (`datasets.Image`), "
            "encoded bytes, or paths. Name another column, or cast it with "
            f"dataset.cast_column('{column}', datasets.Image())."
        )


def pick_columns(
    columns: Columns, present: list[str], where: str, default_caption: str | None
) -> Columns:
    """Choose the columns to read, None for references or captions that may lack and do.

    Raises TrainingError if a column is not there; the message names those that are.
    """
    picked = {}
    for role in _ROLES:
        asked, usual = getattr(columns, role), (getattr(USUAL, role) or "").split()
        if asked is not None and asked not in present:
            raise TrainingError(
                f"{where} has no column '{asked}' for the {_ROLES[role]}; its columns are "
                f"{', '.join(present) or 'none'}. Name one of these."
            )
        picked[role] = asked or next((name for name in usual if name in present), None)
        optional = role in ("reference", "face") or (role == "text" and default_caption is not None)
        if picked[role] is None and not optional:
            raise TrainingError(
                f"{where} has no column for the {_ROLES[role]} (looked for {', '.join(usual)}); "
                f"its columns are {', '.join(present) or 'none'}. Rename one, or name it in the "
                "settings."
            )
    return Columns(**picked)


def _not_found(path: Path) -> str:
    path = path.absolute()
    parent = next(p for p in path.parents if p.is_dir())
    try:
        names = sorted(entry.name for entry in os.scandir(parent))
    except OSError:
        names = []
    listing = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    return (
        f"There is no '{path}'. Expected a folder of pictures and captions, a JSON of the "
        "reference scripts, a `datasets` folder, or WebDataset shards (.tar). In "
        f"'{parent}' lies: {listing}."
    )


# A folder that `datasets` wrote.


def is_saved(path: Path) -> bool:
    """Return whether `path` is a folder that `save_to_disk` wrote."""
    return path.is_dir() and any((path / mark).is_file() for mark in MARKS)


def load_saved(folder: Path) -> Dataset:
    """Open what `save_to_disk` wrote (of a DatasetDict: `train`), or raise TrainingError."""
    try:
        dataset = load_from_disk(str(folder))
    except IndexError:  # `datasets` 5 fails so for one without rows
        raise TrainingError(f"'{folder}' holds no rows. Expected a row for each picture.") from None
    except Exception as error:  # of many kinds, for damaged files
        raise TrainingError(
            f"'{folder}' looks like a dataset that `save_to_disk` wrote, but cannot be loaded "
            f"({type(error).__name__}: {error}). Save it again."
        ) from error
    if isinstance(dataset, DatasetDict):
        splits = list(dataset)
        chosen = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
        if chosen is None:
            raise TrainingError(
                f"'{folder}' has the splits {', '.join(splits)}, none of them 'train'. Give the "
                f"folder of one: '{folder / splits[0]}'."
            )
        dataset = dataset[chosen]
    return dataset


# Rows that are written to the cache folder: of a list, or of a folder of images and texts.

_FEATURES = Features(
    image=Value("string"),
    text=Sequence(Value("string")),
    reference=Value("string"),
    height=Value("int32"),
    width=Value("int32"),
)
_FACES = Features(**_FEATURES, face={"bytes": Value("binary"), "path": Value("string")})


def _through_cache(
    read: Callable[[Path], Iterator[Values]],
    path: Path,
    state: str,
    columns: Columns,
    cache_dir: str | os.PathLike[str] | None,
) -> Dataset:
    """Return the rows that `read` gives; kept in the cache folder until `state` is another."""
    folder = Path(cache_dir or Path(config.HF_DATASETS_CACHE) / "ip_adapter_training")
    known = VERSION, str(path.absolute()), state, columns, *filter(None, [columns.face])
    try:
        return Dataset.from_generator(
            _rows,
            features=_FEATURES if columns.face is None else _FACES,
            cache_dir=str(folder),
            gen_kwargs={"read": read, "path": path, "columns": columns},
            fingerprint=fingerprints.of_repr(known),
        )
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, OSError):
            raise TrainingError(
                f"The list of pictures could not be written to '{folder}': {cause.strerror}. Make "
                "room there, or name a folder that can be written in the environment variable "
                "HF_DATASETS_CACHE."
            ) from error
        raise cause or error from None


def _hash(dataset: Dataset) -> str:
    """Return a hash of what the rows say, the same wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    kept = [name for name in dataset.column_names if name in _ROLES]
    for block in dataset.select_columns(kept).with_format("arrow").iter(BLOCK):
        values = block.to_pydict()
        # A single caption as itself, as it was before there were lists: runs of then go on.
        values["text"] = [x if len(x) > 1 else "".join(x) for x in values["text"]]
        digest.update(json.dumps([*values.values()], default=_digest).encode())
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _rows(
    read: Callable[[Path], Iterator[Values]], path: Path, columns: Columns
) -> Iterator[Values]:
    for number, values in enumerate(read(path), 1):
        yield _row(values, columns, f"'{path}', row {number}")


def _row(values: Values, columns: Columns, where: str) -> Values:
    image, text = values.get(str(columns.image)), values.get(str(columns.text))
    reference = values.get(str(columns.reference))
    reference = None if missing(reference) else reference
    if not isinstance(image, str) or not image:
        raise TrainingError(
            f"{where}: '{columns.image}' is {image!r}; expected the file name of a picture."
        )
    if not isinstance(reference, (str, NoneType)):
        raise TrainingError(
            f"{where}: '{columns.reference}' is {reference!r}; expected the file name of a "
            "picture, or nothing."
        )
    texts = text if isinstance(text, list) else [text]
    if any(isinstance(one, (list, dict)) for one in texts):
        raise TrainingError(
            f"{where}: '{columns.text}' is {text!r}; expected a caption as a text, or a list of "
            "them."
        )
    for name in filter(None, (image, reference)):
        if printable(name) != name:
            raise TrainingError(
                f"{where}: the file name '{printable(name)}' is no UTF-8. Rename the file."
            )
    sizes = {"height": 0, "width": 0}  # not told: the image's header is read
    for name in sizes:
        with suppress(TypeError, ValueError):
            sizes[name] = max(0, int(values.get(name)))  # type: ignore[arg-type]
    row = {"image": image, "text": _filled(texts), "reference": reference, **sizes}
    return row if columns.face is None else row | {"face": _face(values, columns.face, where)}


def _face(values: Values, column: str, where: str) -> dict[str, Any]:
    found = values.get(column)
    if missing(found) or isinstance(found, str):
        return {"bytes": None, "path": None if missing(found) else found}
    try:
        return {"bytes": to_npy(found), "path": None}
    except (ValueError, TypeError) as error:
        raise TrainingError(
            f"{where}: '{column}' is {str(found)[:60]!r} ({error}); expected 512 numbers, or the "
            "name of a .npy file with them."
        ) from error
