"""Which of several files to take: what fits comes first, then what names and metadata hint at.

Some published adapters have twins of the same shapes (light and standard, face and fine-grained),
which nothing in the file tells apart. There a name is a hint: it decides between files, and never
rules one out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from .. import compatibility
from ..adapter import AdapterSpec
from ..variants import Variant, family
from . import origin, published
from .catalogue import AdapterFile, EncoderFile, File, Unusable
from .origin import own
from .ranking import Best, Criterion, best, stem

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_GLUED = re.compile(r"(plus|full)(?=face)", re.IGNORECASE)
_Readable = Mapping[AdapterFile, Sequence[EncoderFile]]


@dataclass(frozen=True)
class Preset:
    """A kind of adapter: its `variant`, and the word that tells it from its twin of the same
    shapes, which its name has to say (`marked`) or must not; no `word`, no twin."""

    name: str
    variant: Variant
    word: str = ""
    marked: bool = False

    def suits(self, file: File) -> bool:
        """Whether the name is as hinted."""
        return not self.word or (self.word in words(file.name)) is self.marked

    def published_adapter(self, spec: AdapterSpec) -> published.Weights | None:
        """Its published adapter for the family that `spec` is made for."""
        known = family(spec.cross_attention_dim, len(spec.layer_dims))
        return published.ADAPTERS[known].get(self.name) if known else None

    def public_name(self, spec: AdapterSpec) -> str | None:
        """That one's name, without ending."""
        weights = self.published_adapter(spec)
        return None if weights is None else PurePath(weights.name).stem


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("light", "base", "light", marked=True),
        Preset("standard", "base", "light"),
        Preset("fine-grained", "plus", "face"),
        Preset("face", "plus", "face", marked=True),
        Preset("full face", "full"),
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
    """Those of a file's name, its folders' included: `plusface_sd15` says plus, face and sd."""
    bare = _GLUED.sub(r"\1_", str(PurePath(name).with_suffix("")))
    return {word.lower() for word in _WORDS.findall(bare)}


def choose(
    adapters: Iterable[AdapterFile],
    encoders: Sequence[EncoderFile],
    preset: Preset,
    unusable: Iterable[Unusable] = (),
) -> Choice | None:
    """The best pair of adapters that fit the model and the preset's variant, and encoders that
    the host can load. None where no encoder gives what one of the adapters reads.

    `unusable`: the other files beside the adapters, of which those that are named as the preset's
    are told of.
    """
    adapters = list(adapters)
    given = {a: [e for e in encoders if e.sizes.gives(a.spec)] for a in adapters}
    readable = {adapter: found for adapter, found in given.items() if found}
    if not readable:
        return None
    criteria = _of_adapters(readable, preset)
    adapter = best(readable, criteria)
    encoder = best(readable[adapter.file], _of_encoders(adapter.file))
    others: list[AdapterFile | Unusable] = [*adapters]
    others += _named(unusable, adapter.file, preset)
    unsuiting = not any(map(preset.suits, others))
    doubts = (
        *_kind(adapter.file, preset),
        *_passed_over(adapter.file, others, criteria, readable, preset),
        *_rivals(adapter),
        *_another(adapter.file, encoder.file),
        *_rivals(encoder),
    )
    why = f"{'no' if preset.marked else 'every'} name here says '{preset.word}'"
    return Choice(
        adapter.file, encoder.file, why if unsuiting else adapter.why, encoder.why, doubts
    )


def _of_adapters(readable: _Readable, preset: Preset) -> Sequence[Criterion[AdapterFile]]:
    word = f"its name says '{preset.word}'" if preset.marked else f"its name has no '{preset.word}'"
    return (
        Criterion(
            "its name is not the published one of another preset", lambda a: not _other(a, preset)
        ),
        Criterion(
            "its own image encoder is here",
            lambda a: any(own(a, e) for e in readable[a]),
            certain=True,
        ),
        Criterion(
            "its image encoder is the smaller one", lambda a: -a.spec.feature_dim, certain=True
        ),
        Criterion(word, preset.suits),
        Criterion("its name is the published one", lambda a: published.is_name(a.name)),
        Criterion("it is a .safetensors file", lambda a: a.name.endswith(".safetensors")),
    )


def _of_encoders(adapter: AdapterFile) -> Sequence[Criterion[EncoderFile]]:
    return (
        Criterion(
            "it is the one that the adapter was trained with",
            lambda e: own(adapter, e),
            certain=True,
        ),
        Criterion("it is of a published encoder's sizes", _is_published, certain=True),
        Criterion("its name is the published one", lambda e: published.is_name(e.name)),
        Criterion("ComfyUI reads it itself", lambda e: e.sizes.layout == "transformers"),
        Criterion("it holds no text tower", lambda e: e.sizes.alone),
    )


def _is_published(encoder: EncoderFile) -> bool:
    return any(origin.is_of(encoder, weights) for weights in published.ENCODERS.values())


def _other(adapter: AdapterFile, preset: Preset) -> bool:
    """Whether it has the published name of another preset's adapter, and contents to match."""
    spec = adapter.spec
    if published.encoder(spec.features, spec.feature_dim) is not published.VIT_H:
        return False
    return any(
        _base(adapter) == other.public_name(spec) and other.variant == spec.variant
        for other in PRESETS.values()
        if other != preset
    )


def _base(file: File) -> str:
    return PurePath(stem(file)).name


def _named(files: Iterable[Unusable], chosen: AdapterFile, preset: Preset) -> Iterable[Unusable]:
    """Those whose names are the preset's: that a word is missing says nothing of them."""
    name = preset.public_name(chosen.spec)
    for file in files:
        if _base(file) == name or (preset.marked and preset.suits(file)):
            yield file


def _kind(chosen: AdapterFile, preset: Preset) -> Iterable[str]:
    if not preset.suits(chosen):
        says = f"does not say '{preset.word}'" if preset.marked else f"says '{preset.word}'"
        weights = preset.published_adapter(chosen.spec)
        yield (
            f"the name of '{chosen.name}' {says}, and the contents of a '{preset.name}' adapter "
            f"look the same as those of its twin: it may be the other kind"
            + (f" (the published '{preset.name}' adapter is {weights.url})" if weights else "")
        )


def _passed_over(
    chosen: AdapterFile,
    others: Iterable[AdapterFile | Unusable],
    criteria: Sequence[Criterion[AdapterFile]],
    readable: _Readable,
    preset: Preset,
) -> Iterable[str]:
    """Of files whose names promise more than the chosen one's: why none of them was taken."""
    name = preset.public_name(chosen.spec)

    def promise(file: File) -> tuple[bool, bool]:
        return preset.suits(file), _base(file) == name

    for file in others:
        if promise(file) <= promise(chosen):
            continue
        if isinstance(file, Unusable):
            reason = file.reason.rstrip(".")
        elif file in readable:
            reason = f"of '{chosen.name}', {best((chosen, file), criteria).why}"
        else:
            reason = f"no image encoder that gives {origin.read_by(file.spec)} is here"
        yield (
            f"'{file.name}', whose name is as expected of the preset '{preset.name}', was passed "
            f"over: {reason}"
        )


def _rivals(chosen: Best[AdapterFile] | Best[EncoderFile]) -> Iterable[str]:
    names = [file.name for file in chosen.rivals]
    if names:
        yield (
            f"{_few(names)} {'fits' if len(names) == 1 else 'fit'} as well as "
            f"'{chosen.file.name}', so that only names, formats and layouts could decide"
        )


def _another(adapter: AdapterFile, encoder: EncoderFile) -> Iterable[str]:
    if not own(adapter, encoder):
        noted = adapter.trained_with if compatibility.words(adapter.trained_with) else None
        yield (
            f"'{encoder.name}' gives features of the right width, but the encoder that "
            f"'{adapter.name}' was trained with is "
            f"{noted or 'another one, as far as sizes and activation tell'}"
        )


def _few(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
