"""What the name of an image encoder tells, in an adapter's metadata or of a file."""

from __future__ import annotations

import functools
import re
import unicodedata
from pathlib import PurePath

from .adapter import AdapterSpec
from .files import published
from .files.adapter_file import EXTENSIONS

_OPEN_CLIP = "open_clip:"  # as training's settings begin: MODEL/WEIGHTS, MODEL@FILE or FILE
# What the files and folders of any encoder are called.
_GENERIC = {
    *(("image", "encoder"), ("vision", "encoder"), ("clip", "vision"), ("model",)),
    *(("pytorch", "model"), ("open", "clip", "model"), ("open", "clip", "pytorch", "model")),
}


def expected(trained_with: str | None, spec: AdapterSpec) -> published.Weights | None:
    """The published encoder that `trained_with` stands for, a name in an adapter's metadata; where
    it tells nothing, the one whose features are as wide as `spec` reads. None for another one."""
    found = words(trained_with)
    return _published(found) if found else published.encoder(spec.features, spec.feature_dim)


def words(trained_with: str | None) -> tuple[str, ...]:
    """Those of the encoder's name in an adapter's metadata; none where they tell nothing."""
    name = trained_with or ""
    if name.startswith(_OPEN_CLIP):
        name = re.split("[@:]", name)[-1]
    found = words_of_file(name)
    return () if found in _GENERIC else found


@functools.lru_cache(maxsize=4096)
def words_of_file(name: str) -> tuple[str, ...]:
    path = PurePath(name)
    bare = path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path
    return tuple(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", str(bare)).casefold()))


def within(some: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether they stand there side by side."""
    starts = range(len(others) - len(some) + 1)
    return any(others[i : i + len(some)] == some for i in starts)


def _published(found: tuple[str, ...]) -> published.Weights | None:
    """The encoder that open_clip's tag, or the published name, stands for."""
    names = {weights.name: weights for weights in published.ENCODERS.values()} | published.TAGS
    return next(
        (known for name, known in names.items() if within(words_of_file(name), found)), None
    )
