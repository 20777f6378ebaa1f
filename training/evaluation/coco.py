"""Images with one caption each: COCO val2017, or any folder that training reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..data.sources import Record, Source, open_source
from ..errors import TrainingError

Rows = list[Record] | Source
ANNOTATION = Path("annotations", "captions_val2017.json")


def read(folder: str) -> Rows:
    """Return COCO's rows in the order of its annotation file, or those of a folder with captions.

    Raises TrainingError if there is neither.
    """
    root = Path(folder)
    if not root.exists():
        raise TrainingError(
            f"'{folder}' does not exist. Give --eval_data_dir the folder that holds val2017/ and "
            f"{ANNOTATION}, or any folder of images with captions."
        )
    if (root / ANNOTATION).exists():
        return _annotated(root)
    if (root / "val2017").exists():
        raise TrainingError(
            f"'{folder}' holds val2017/, but not {ANNOTATION}. Fetch "
            "annotations_trainval2017.zip from COCO's site and unpack it there."
        )
    try:
        return open_source(folder)
    except TrainingError as error:
        raise TrainingError(
            f"'{folder}' holds no {ANNOTATION}, and as a folder: {error}"
        ) from error


def _annotated(root: Path) -> list[Record]:
    """Return a row an image, with the first of its captions (the file has five and more)."""
    path = root / ANNOTATION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        first: dict[int, str] = {}
        for annotation in content["annotations"]:
            first.setdefault(int(annotation["image_id"]), str(annotation["caption"]).strip())
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"'{path}' is no COCO caption file ({type(error).__name__}: {error}); expected "
            "'images' with id and file_name, and 'annotations' with image_id and caption. Unpack "
            "annotations_trainval2017.zip again."
        ) from error
    if not files:
        raise TrainingError(f"'{path}' names no images. Unpack it again.")
    bare = [name for number, name in files.items() if not first.get(number)]
    if bare:
        raise TrainingError(
            f"{len(bare)} of {len(files)} images in '{path}' have no caption, the first "
            f"{bare[0]}. Unpack annotations_trainval2017.zip again."
        )
    images = root / "val2017" if (root / "val2017").is_dir() else root
    return [Record(name, images / name, first[number]) for number, name in files.items()]


def check_present(rows: Rows, numbers: range) -> None:
    """Raise TrainingError if a row's file is not there: hours later would be too late."""
    paths = [rows[number].image for number in numbers]
    missing = [path for path in paths if isinstance(path, Path) and not path.is_file()]
    if missing:
        raise TrainingError(
            f"{len(missing)} of {len(paths)} images are missing, the first '{missing[0]}'. "
            "Unpack val2017.zip again, or correct the captions' file names."
        )


def fingerprint(rows: Rows) -> str:
    """Of the rows' names and captions, in order."""
    digest = hashlib.sha256()
    for record in map(rows.__getitem__, range(len(rows))):
        digest.update(json.dumps([record.name, record.text]).encode())
    return digest.hexdigest()[:16]
