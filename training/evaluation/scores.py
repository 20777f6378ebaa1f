"""Scores of single samples as JSON lines: what is measured once is measured.

    OUT/protocol.json        what the scores were measured with; other options are refused
    OUT/scores-00000.jsonl   one file a process, one line a sample, only ever appended to

A line is complete when it ends; a process that is killed while writing leaves at most one torn
line, which is cut off when that file is next opened and ignored until then.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ip_adapter_core.files.atomic import atomic

from ..errors import TrainingError

PROTOCOL = "protocol.json"
# These may change: their weights are compared.
NAMES = ("pretrained_model_name_or_path", "image_encoder_path", "clip_model")
IMAGE_ONLY, WITH_TEXT = "image_only", "with_text"

logger = logging.getLogger(__name__)


class Condition(NamedTuple):
    """What a sample is drawn under: the adapter (by its digest), the prompt, and λ."""

    adapter: str
    prompt: str
    weight: float


class Key(NamedTuple):
    """Which sample."""

    condition: Condition
    row: int
    sample: int


class Score(NamedTuple):
    """Likeness to the image and to the caption."""

    clip_i: float
    clip_t: float


class Found(NamedTuple):
    """What a folder holds: scores, and the rows whose image could not be opened, with why."""

    scores: dict[Key, Score]
    broken: dict[int, str]


def claim(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Make an existing folder one of scores measured with `protocol`, or see that it is.

    Raises TrainingError if it cannot be written, or holds scores of another protocol: those do
    not belong in one table.
    """
    path = folder / PROTOCOL
    try:
        now = json.dumps(dict(protocol), indent=1, ensure_ascii=False)
        if not path.exists():
            replace_text(path, now)
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"'{path}' cannot be written or read ({error}). Make room, give --output_dir another "
            "folder, or delete this one to measure anew."
        ) from error
    asked = json.loads(now)
    keys = {*stored, *asked} - {*NAMES}
    differing = {key for key in keys if stored.get(key) != asked.get(key)}
    if differing:
        named = {key.removesuffix("_weights") for key in differing}  # hashes tell nobody anything
        listed = "; ".join(f"{k}: {stored.get(k)!r}, now {asked.get(k)!r}" for k in sorted(named))
        raise TrainingError(
            f"'{folder}' holds scores that were measured with other options ({listed}). Give "
            "--output_dir another folder, or the same options as before."
        )


def read(folder: Path) -> Found:
    """All scores, whichever process wrote them.

    Lines that cannot be read are left out: their samples are measured again.
    """
    found, damaged = Found({}, {}), 0
    for path in sorted(folder.glob("scores-*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last \n is torn
            try:
                _take(json.loads(line), found)
            except (ValueError, TypeError, KeyError):
                damaged += 1
    if damaged:
        logger.warning(
            "%d damaged lines in '%s' are left out; those samples are drawn again.", damaged, folder
        )
    return found


def _take(line: Mapping[str, Any], found: Found) -> None:
    if "broken" in line:
        found.broken[int(line["row"])] = str(line["broken"])
        return
    condition = Condition(str(line["adapter"]), str(line["prompt"]), float(line["weight"]))
    key = Key(condition, int(line["row"]), int(line["sample"]))
    found.scores[key] = Score(float(line["clip_i"]), float(line["clip_t"]))


class Writer:
    """One process's file."""

    def __init__(self, folder: Path, process: int) -> None:
        self.path = folder / f"scores-{process:05d}.jsonl"
        self.path.touch()
        with self.path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def scores(self, scores: Iterable[tuple[Key, Score]]) -> None:
        """Append; what this returns from lies on the disk."""
        self._append(
            {**k.condition._asdict(), "row": k.row, "sample": k.sample, **s._asdict()}
            for k, s in scores
        )

    def broken(self, row: int, reason: str) -> None:
        """Note a row that cannot be measured."""
        self._append([{"row": row, "broken": reason}])

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        try:
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(
                f"Scores could not be written to '{self.path}': {error.strerror}. Make room and "
                "run the same command again; it goes on from here."
            ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
