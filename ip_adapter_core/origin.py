"""Which image encoder an adapter was trained with: as its metadata says, else as sizes tell."""

from __future__ import annotations

import functools
import re
import unicodedata
from pathlib import PurePath

from . import published
from .adapter import AdapterSpec
from .catalogue import AdapterFile, EncoderFile
from .checkpoint import EXTENSIONS
from .prompt import encoder_name

_OPEN_CLIP = "open_clip:"  # as training's settings begin: MODEL/WEIGHTS, MODEL@FILE or FILE
# What the files and folders of any encoder are called.
_GENERIC = {
    *(("image", "encoder"), ("vision", "encoder"), ("clip", "vision"), ("model",)),
    *(("pytorch", "model"), ("open", "clip", "model"), ("open", "clip", "pytorch", "model")),
}


def own(adapter: AdapterFile, encoder: EncoderFile) -> bool:
    """Whether the adapter was trained with this encoder, as far as can be told.

    A name in its metadata that is of a published encoder goes by that encoder's sizes; another one
    has to be in the name of the encoder's file. Where there is none, or one that any encoder may
    have, it is the published encoder whose features are as wide as the adapter's.
    """
    trained = trained_with(adapter)
    expected = _published(trained)
    if expected is None and trained:
        return _within(trained, _words(encoder.name))
    if expected is None:
        expected = published.encoder(adapter.spec.features, adapter.spec.feature_dim)
    return expected is None or is_of(encoder, expected)


def trained_with(adapter: AdapterFile) -> tuple[str, ...]:
    """The words of the encoder's name in the metadata; none where they tell nothing."""
    name = adapter.trained_with or ""
    if name.startswith(_OPEN_CLIP):
        name = re.split("[@:]", name)[-1]
    words = _words(name)
    return () if words in _GENERIC else words


def is_of(encoder: EncoderFile, weights: published.Weights) -> bool:
    """Whether it has sizes and activation of the published encoder; the projection may be left
    out."""
    found = encoder.sizes
    return not found.quick_gelu and any(
        (found.hidden_dim, found.positions) == (hidden, positions) and found.embed_dim in (0, embed)
        for (embed, hidden, positions), known in published.ENCODERS.items()
        if known is weights
    )


def read_by(spec: AdapterSpec) -> str:
    """The features that an adapter reads."""
    encoder = encoder_name(spec.features, spec.feature_dim)
    width = f"{spec.features.replace('_', ' ')} {spec.feature_dim} wide"
    return f"{width} ({encoder})" if encoder else width


def _published(words: tuple[str, ...]) -> published.Weights | None:
    """The encoder that open_clip's tag, or the published name, stands for."""
    names = {weights.name: weights for weights in published.ENCODERS.values()} | published.TAGS
    return next((known for name, known in names.items() if _within(_words(name), words)), None)


@functools.lru_cache(maxsize=4096)
def _words(name: str) -> tuple[str, ...]:
    path = PurePath(name)
    bare = path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path
    return tuple(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", str(bare)).casefold()))


def _within(words: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether they stand there side by side."""
    starts = range(len(others) - len(words) + 1)
    return any(others[i : i + len(words)] == words for i in starts)
