"""Which of several files to take: what fits comes first, then what names and metadata hint at.

Some published adapters have twins of the same shapes (light and standard, face and fine-grained),
which nothing in the file tells apart. There a name is a hint: it decides between files, and never
rules one out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

from . import published
from .catalogue import AdapterFile, EncoderFile, File
from .families import family

_File = TypeVar("_File", bound=File)
# In order of weight: what makes one file better than another, and its rank, the least first.
_Criteria = Sequence[tuple[str, Callable[[_File], Any]]]
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass(frozen=True)
class Preset:
    """A kind of adapter: its `projection`, and the word that tells it from its twin of the same
    shapes, which its name has to say (`marked`) or must not; no `word`, no twin."""

    name: str
    projection: str
    word: str = ""
    marked: bool = False

    def suits(self, file: File) -> bool:
        """Whether the name is as hinted."""
        return not self.word or (self.word in words(file.name)) is self.marked


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("light", "linear", "light", marked=True),
        Preset("standard", "linear", "light"),
        Preset("fine-grained", "resampler", "face"),
        Preset("face", "resampler", "face", marked=True),
        Preset("full face", "mlp"),
    )
}


@dataclass(frozen=True)
class Choice:
    """What was chosen, why (empty where nothing else could be), and what remains in doubt."""

    adapter: AdapterFile
    encoder: EncoderFile
    adapter_why: str
    encoder_why: str
    doubts: tuple[str, ...]


def words(name: str) -> set[str]:
    """Those of a file's name, its folders' included: `PlusFace_sd15` says plus, face and sd."""
    return {word.lower() for word in _WORDS.findall(_stem(name))}


def choose(
    adapters: Iterable[AdapterFile], encoders: Sequence[EncoderFile], preset: Preset
) -> Choice | None:
    """The best pair of adapters that fit the model and the preset's projection, and encoders that
    the host can load. None where no encoder gives what one of the adapters reads."""
    readable = {a: [e for e in encoders if e.sizes.gives(a.spec)] for a in adapters}
    readable = {adapter: given for adapter, given in readable.items() if given}
    if not readable:
        return None
    word = f"its name says '{preset.word}'" if preset.marked else f"its name has no '{preset.word}'"
    adapter, adapter_why = _best(
        readable,
        (
            ("its name is not the published one of another preset", lambda a: _other(a, preset)),
            ("its own image encoder is here", lambda a: not any(own(a, e) for e in readable[a])),
            ("its image encoder is the smaller one", lambda a: a.spec.feature_dim),
            (word, lambda a: not preset.suits(a)),
            ("its name is the published one", lambda a: _base(a) not in published.NAMES),
            ("it is a .safetensors file", lambda a: not a.name.endswith(".safetensors")),
            ("its name comes first", lambda a: a.name),
        ),
    )
    if not preset.suits(adapter):
        adapter_why = f"{'no' if preset.marked else 'every'} name here says '{preset.word}'"
    given = readable[adapter]
    encoder, encoder_why = _best(
        given,
        (
            ("it is the one that the adapter was trained with", lambda e: not own(adapter, e)),
            ("it is of a published encoder's sizes", lambda e: not _published(e)),
            ("its name is the published one", lambda e: _base(e) not in published.NAMES),
            ("ComfyUI reads it itself", lambda e: e.sizes.layout != "transformers"),
            ("it holds no text tower", lambda e: not e.sizes.alone),
            ("its name comes first", lambda e: e.name),
        ),
    )
    doubts = (*_twins(adapter, readable, preset), *_other_encoders(adapter, encoder, given))
    return Choice(adapter, encoder, adapter_why, encoder_why, doubts)


def own(adapter: AdapterFile, encoder: EncoderFile) -> bool:
    """Whether the adapter was trained with this encoder, as far as can be told: by the name in
    its metadata, else by sizes, if its features are as wide as a published encoder's."""
    if adapter.trained_with is not None:
        trained, found = (
            re.sub(r"[^a-z0-9]", "", PurePath(name).stem.lower())
            for name in (adapter.trained_with, encoder.name)
        )
        return trained in found
    spec = adapter.spec
    return published.encoder(spec.features, spec.feature_dim) is None or _published(encoder)


def _other(adapter: AdapterFile, preset: Preset) -> bool:
    """Whether it has the published name of another preset's adapter, and contents to match."""
    spec = adapter.spec
    name = family(spec.cross_attention_dim, len(spec.layer_dims)) or ""
    named = (
        PRESETS[other]
        for other, weights in published.ADAPTERS.get(name, {}).items()
        if PurePath(weights.name).stem == PurePath(adapter.name).stem
    )
    fits = published.encoder(spec.features, spec.feature_dim) is published.VIT_H
    return any(fits and own.projection == spec.projection and own != preset for own in named)


def _published(encoder: EncoderFile) -> bool:
    """Whether it is of a published encoder's sizes; the projection may be left out."""
    found = encoder.sizes
    return any(
        (found.hidden_dim, found.positions) == (hidden, positions) and found.embed_dim in (0, embed)
        for embed, hidden, positions in published.ENCODERS
    )


def _stem(name: str) -> str:
    return str(PurePath(name).with_suffix(""))


def _base(file: File) -> str:
    return PurePath(file.name).name


def _best(files: Iterable[_File], criteria: _Criteria[_File]) -> tuple[_File, str]:
    ranks = {file: [rank(file) for _, rank in criteria] for file in files}
    first, *others = sorted(files, key=lambda file: ranks[file])
    if not others:
        return first, ""
    pairs = zip(criteria, ranks[first], ranks[others[0]], strict=True)
    return first, next((reason for (reason, _), one, other in pairs if one != other), "")


def _twins(chosen: AdapterFile, candidates: Iterable[AdapterFile], preset: Preset) -> Iterable[str]:
    twins = [
        file.name
        for file in candidates
        if file.spec == chosen.spec and _stem(file.name) != _stem(chosen.name)
    ]
    if not preset.suits(chosen):
        says = f"does not say '{preset.word}'" if preset.marked else f"says '{preset.word}'"
        yield (
            f"the name of '{chosen.name}' {says}, and the contents of a '{preset.name}' adapter "
            f"look the same as those of its twin: it may be the other kind"
        )
    if twins:
        yield (
            f"{_few(twins)} {'has' if len(twins) == 1 else 'have'} the same shapes as "
            f"'{chosen.name}', so that only the names could decide"
        )


def _other_encoders(
    adapter: AdapterFile, chosen: EncoderFile, candidates: Iterable[EncoderFile]
) -> Iterable[str]:
    if not own(adapter, chosen):
        trained = adapter.trained_with or "another one, as far as its sizes tell"
        yield (
            f"'{chosen.name}' gives features of the right width, but the encoder that "
            f"'{adapter.name}' was trained with is {trained}"
        )
    sizes = chosen.sizes
    alike = [
        file.name
        for file in candidates
        if file is not chosen
        and (file.sizes.hidden_dim, file.sizes.layers, file.sizes.positions)
        == (sizes.hidden_dim, sizes.layers, sizes.positions)
    ]
    if alike:
        yield (
            f"{_few(alike)} {'has' if len(alike) == 1 else 'have'} the same sizes as the image "
            f"encoder '{chosen.name}', so that only names and layouts could decide"
        )


def _few(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
