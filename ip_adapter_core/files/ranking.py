"""The best of several files by criteria in order, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from .catalogue import File

_File = TypeVar("_File", bound=File)


@dataclass(frozen=True)
class Criterion(Generic[_File]):
    """What makes one file better than another: the higher `score`.

    `certain` where contents tell it, and not name, format or layout, which only hint.
    """

    why: str
    score: Callable[[_File], Any]
    certain: bool = False


@dataclass(frozen=True)
class Best(Generic[_File]):
    """The best file; what made it better than the next, empty if there is no other; and the
    `rivals`, which lost to it by an uncertain criterion."""

    file: _File
    why: str
    rivals: tuple[_File, ...]


def best(files: Iterable[_File], criteria: Sequence[Criterion[_File]]) -> Best[_File]:
    """The first criterion that tells two files apart decides between them, in the end the
    alphabet. Raises IndexError where there is no file."""
    by_name = Criterion[_File]("its name comes first", lambda _: 0)
    scores = {file: [criterion.score(file) for criterion in criteria] for file in files}
    first, *others = sorted(
        sorted(scores, key=lambda file: file.name), key=scores.__getitem__, reverse=True
    )

    def decided(other: _File) -> Criterion[_File]:
        pairs = zip(criteria, scores[first], scores[other], strict=True)
        return next((criterion for criterion, a, b in pairs if a != b), by_name)

    rivals = (file for file in others if stem(file) != stem(first) and not decided(file).certain)
    return Best(first, decided(others[0]).why if others else "", tuple(rivals))


def stem(file: File) -> str:
    """Its name without ending, folders included: the same for one model in two formats."""
    return str(PurePath(file.name).with_suffix(""))
