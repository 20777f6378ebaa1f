"""Find an adapter and its image encoder among the files of models folders.

A search looks at every file, so that none may cost more than its header, none may stop it, and
none is looked at twice unless it changed. What fits comes first, then what names and metadata hint
at: some published adapters have twins of the same shapes (light and standard, face and
fine-grained), which nothing in the file tells apart. There a name decides between files, and never
rules one out.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from ..adapter import AdapterSpec
from ..compatibility import expected_encoder, within, words, words_of_file
from ..variants import (
    CROSS_ATTENTION,
    FACE,
    FAMILY_LABELS,
    VARIANT_LABELS,
    Place,
    Variant,
    describe_model,
    model_label,
)
from . import adapter_file, published, trained_layouts
from .encoder_file import EncoderSizes, encoder_sizes
from .header import OLD_FORMAT, CheckpointError, file_format, read_header, shapes
from .tower_config import ImageEncoderError, configurations

Stamp = tuple[str, int, int]  # path, time of change in nanoseconds, bytes
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_GLUED = re.compile(r"(plus|full)(?=face)", re.IGNORECASE)
_SHOWN = 5  # of the files found instead


# Files


@dataclass(frozen=True)
class File:
    """A file of a models folder, under the name that ComfyUI lists."""

    name: str
    path: str

    @property
    def stem(self) -> str:
        """Its name without ending, folders included: the same for one model in two formats."""
        return str(PurePath(self.name).with_suffix(""))


@dataclass(frozen=True)
class Folder:
    """A kind of models folder: where ComfyUI looks for it, and the files that it lists."""

    paths: tuple[str, ...]
    files: tuple[File, ...]


@dataclass(frozen=True)
class AdapterFile(File):
    """`trained_with`: the image encoder's name, where this repository's training noted it."""

    spec: AdapterSpec
    trained_with: str | None = None

    def __str__(self) -> str:
        spec = self.spec
        sizes = spec.cross_attention_dim, len(spec.layer_dims), spec.kolors
        model = describe_model(*sizes, spec.place)
        return (
            f"'{self.name}': a {VARIANT_LABELS[spec.variant]} IP-Adapter for {model}; reads "
            f"{_features(spec)}"
        )


@dataclass(frozen=True)
class EncoderFile(File):
    sizes: EncoderSizes

    def __str__(self) -> str:
        embeds, hidden = (
            f"{width} wide" if width else "none"
            for width in (self.sizes.embed_dim, self.sizes.hidden_dim)
        )
        return (
            f"'{self.name}': an image encoder in the layout of {self.sizes.layout}; image embeds "
            f"{embeds}, penultimate hidden states {hidden}"
        )

    def has_sizes(self, weights: published.Weights) -> bool:
        """Return whether it has sizes and activation of the published encoder.

        The projection may be left out.
        """
        s = self.sizes
        other = s.quick_gelu and weights not in (published.VIT_L, published.VIT_L_336)
        return not other and published.has_sizes(weights, s.embed_dim, s.hidden_dim, s.positions)


@dataclass(frozen=True)
class Unusable(File):
    """Neither, or not whole; `reason` is a sentence that names the file."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def stamps(path: str) -> tuple[Stamp, ...] | None:
    """Return what changes when the file does, or a configuration beside it; None for no file."""
    try:
        files = (path, *map(str, configurations(path)))
        return tuple((file, (s := os.stat(file)).st_mtime_ns, s.st_size) for file in files)
    except OSError:  # a link that leads nowhere, or a file that went meanwhile
        return None


def digest(stamped: Iterable[tuple[Stamp, ...] | None]) -> str:
    """Return what changes when a stamp does.

    ComfyUI writes what a node's fingerprint is into every saved image, and where somebody's models
    lie is nobody else's business.
    """
    return hashlib.sha256(repr([*stamped]).encode()).hexdigest()


def adapters(files: Iterable[File]) -> list[AdapterFile | Unusable]:
    """Return every file as an adapter, or why it is none. Raises nothing but MemoryError."""
    return [_inspected(_adapter, file) for file in files]


def encoders(files: Iterable[File]) -> list[EncoderFile | Unusable]:
    """Return every file as an encoder, or why it is none. Raises nothing but MemoryError."""
    return [_inspected(_encoder, file) for file in files]


def _adapter(file: File) -> AdapterFile:
    kind = file_format(file.path)
    if kind == "pickle":
        raise CheckpointError(f"'{file.name}': {OLD_FORMAT}.")
    if kind == "safetensors":
        layout, metadata = read_header(file.path)
        layout = {**trained_layouts.published(layout, file.name)}
    else:
        layout, metadata = shapes(adapter_file.read(file.path, mapped=True)), {}
    spec = adapter_file.recognize(layout, file.name)
    return AdapterFile(file.name, file.path, spec, adapter_file.trained_with(metadata))


def _encoder(file: File) -> EncoderFile:
    return EncoderFile(file.name, file.path, encoder_sizes(file.path))


def _inspected(inspect: Callable[[File], File], file: File) -> Any:
    stamp = stamps(file.path)
    if stamp is None or not os.access(file.path, os.R_OK):
        return Unusable(file.name, file.path, f"'{file.name}' cannot be read.")
    try:
        return _remembered(inspect, file, stamp)
    except MemoryError:
        raise
    except Exception as error:
        return _unusable(file, error)


@functools.lru_cache(maxsize=4096)
def _remembered(inspect: Callable[[File], File], file: File, stamp: tuple[Stamp, ...]) -> File:
    """Look once at a file of this `stamp`. Raises, and so forgets, what another try may mend."""
    try:
        return inspect(file)
    except Exception as error:  # of any file that lies there; torch raises a dozen kinds
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError | MemoryError):  # a share that is away, a full memory
                raise
            cause = cause.__cause__
        return _unusable(file, error)


def _unusable(file: File, error: Exception) -> Unusable:
    if isinstance(error, CheckpointError):
        reason = str(error)
    elif isinstance(error, ImageEncoderError):
        reason = f"'{file.name}': {error}."
    else:
        first = next(iter(str(error).splitlines()), "")
        reason = f"'{file.name}' cannot be read ({type(error).__name__}: {first})."
    return Unusable(file.name, file.path, reason)


# The choice


@dataclass(frozen=True)
class AdapterPreset:
    """What users ask for: a variant, and the words that tell it from twins of the same shapes.

    The name of a file has to say one of the `words` or must not, as `marked` tells; no words, no
    twins. `feature_dim`, `tokens`: the width of the features that it reads and the number of tokens
    that it makes, where only one will do. `on_flux`: the variant that it is there, if any.
    """

    name: str
    variant: Variant
    words: tuple[str, ...] = ()
    marked: bool = False
    feature_dim: int | None = None
    tokens: int | None = None
    on_flux: Variant | None = None

    @property
    def word(self) -> str:
        """The words for messages."""
        return "' or '".join(self.words)

    def asks_for(self, spec: AdapterSpec) -> bool:
        """Return whether an adapter is of the preset's kind, as far as contents tell."""
        sizes = (self.feature_dim, spec.feature_dim), (self.tokens, spec.tokens)
        same = all(asked in (None, found) for asked, found in sizes)
        return spec.variant == self.variant_at(spec.place) and same

    def variant_at(self, place: Place) -> Variant | None:
        """Return the variant for models that have layers at a place."""
        return self.variant if place == CROSS_ATTENTION else self.on_flux

    def suits(self, file: File) -> bool:
        """Return whether the file's name is as hinted."""
        says = bool(name_words(file.name).intersection(self.words))
        return not self.words or says is self.marked

    def published_adapter(self, spec: AdapterSpec) -> published.Weights | None:
        """Return its published adapter for the family that `spec` is made for."""
        sizes = spec.cross_attention_dim, len(spec.layer_dims), spec.kolors
        return published.adapters(*sizes).get(self.name)

    def encoder(self, place: Place) -> published.Weights:
        """Return the encoder that its published adapters read."""
        if place != CROSS_ATTENTION:
            return published.VIT_L if self.on_flux == "base" else published.SIGLIP
        return published.VIT_BIGG if self.feature_dim == 1280 else published.VIT_H

    def is_published_name(self, file: File, spec: AdapterSpec) -> bool:
        """Return whether the file is called as the published one, in any folder and format."""
        weights = self.published_adapter(spec)
        return weights is not None and PurePath(file.stem).name == PurePath(weights.name).stem


ADAPTER_PRESETS = {
    preset.name: preset
    for preset in (
        AdapterPreset("light", "base", ("light",), marked=True),
        AdapterPreset("standard", "base", ("light",), on_flux="base"),
        AdapterPreset("fine-grained", "plus", ("face", "composition"), on_flux="instantx"),
        AdapterPreset("face", "plus", ("face",), marked=True),
        AdapterPreset("full face", "full"),
        AdapterPreset("composition", "plus", ("composition",), marked=True),
        AdapterPreset("bigG", "base", feature_dim=1280),
        AdapterPreset("faceid", "faceid", tokens=4),
        AdapterPreset("faceid-plus", "faceid-plus"),
        AdapterPreset("portrait", "faceid", tokens=16),
    )
}


@dataclass(frozen=True)
class Choice:
    """What was chosen, why (empty where nothing else could be), and what remains in doubt.

    `encoder`: None for an adapter that reads faces alone.
    """

    adapter: AdapterFile
    encoder: EncoderFile | None
    adapter_why: str
    encoder_why: str
    doubts: tuple[str, ...]

    def chosen(self) -> list[str]:
        """Return a line for the adapter and one for the encoder: what they are and why these."""
        pairs = (self.adapter, self.adapter_why), (self.encoder, self.encoder_why)
        told = [f"{file}{why and f' (chosen: {why})'}" for file, why in pairs if file is not None]
        return told if self.encoder is not None else [*told, "It reads no image encoder."]


class Criterion(NamedTuple):
    """What makes one file better than another: the higher `score`.

    `certain` where contents tell it, and not name, format or layout, which only hint.
    """

    why: str
    score: Callable[[Any], Any]
    certain: bool = False


def name_words(name: str) -> set[str]:
    """Return those of a file's name and folders: `plusface_sd15` says plus, face and sd."""
    bare = _GLUED.sub(r"\1_", str(PurePath(name).with_suffix("")))
    return {word.lower() for word in _WORDS.findall(bare)}


def own(adapter: AdapterFile, encoder: EncoderFile) -> bool:
    """Return whether the adapter was trained with this encoder, as far as can be told.

    A name in its metadata that is of a published encoder goes by that encoder's sizes; another one
    has to be in the name of the encoder's file. Where there is none, or one that any encoder may
    have, it is the published encoder whose features are as wide as the adapter's.
    """
    expected = expected_encoder(adapter.spec, adapter.trained_with)
    if expected is not None:
        return encoder.has_sizes(expected)
    name = words(adapter.trained_with)
    return not name or within(name, words_of_file(encoder.name))


def choose(
    adapters: Iterable[AdapterFile],
    encoders: Sequence[EncoderFile],
    preset: AdapterPreset,
    unusable: Iterable[Unusable] = (),
) -> Choice | None:
    """Choose the best pair of adapter and encoder.

    Args:
        adapters: Those that fit the model and the preset's variant.
        encoders: Those that can be loaded.
        preset: What is asked for.
        unusable: The other files beside the adapters; those that are named as the preset's are
            told of.

    Returns:
        The choice; None where no encoder gives what one of the adapters reads.
    """
    adapters = list(adapters)
    if adapters and all(a.spec.features == FACE for a in adapters):
        readable_faces: dict[AdapterFile, Sequence[EncoderFile]] = {a: () for a in adapters}
        names = [c for c in _of_adapters(readable_faces, preset) if not c.certain]
        best, why, rivals = _best(adapters, names)
        return Choice(best, None, why, "", tuple(rivals))
    givers = {a: [e for e in encoders if e.sizes.gives(a.spec)] for a in adapters}
    readable = {adapter: found for adapter, found in givers.items() if found}
    if not readable:
        return None
    criteria = _of_adapters(readable, preset)
    adapter, adapter_why, adapter_rivals = _best(readable, criteria)
    encoder, encoder_why, encoder_rivals = _best(readable[adapter], _of_encoders(adapter))
    # That a word is missing says nothing of a file that cannot be used.
    named = [
        file
        for file in unusable
        if preset.is_published_name(file, adapter.spec) or (preset.marked and preset.suits(file))
    ]
    others: list[File] = [*adapters, *named]
    if not any(map(preset.suits, others)):
        adapter_why = f"{'no' if preset.marked else 'every'} name here says '{preset.word}'"
    doubts = [
        *_kind_doubt(adapter, preset),
        *_passed_over(adapter, others, criteria, readable, preset),
        *adapter_rivals,
    ]
    if not own(adapter, encoder):
        noted = adapter.trained_with if words(adapter.trained_with) else None
        doubts.append(
            f"'{encoder.name}' gives features of the right width, but the encoder that "
            f"'{adapter.name}' was trained with is "
            f"{noted or 'another one, as far as sizes and activation tell'}"
        )
    return Choice(adapter, encoder, adapter_why, encoder_why, (*doubts, *encoder_rivals))


def _of_adapters(
    readable: Mapping[AdapterFile, Sequence[EncoderFile]], preset: AdapterPreset
) -> Sequence[Criterion]:
    word = f"its name says '{preset.word}'" if preset.marked else f"its name has no '{preset.word}'"

    def another_presets(adapter: AdapterFile) -> bool:
        """Return whether it has another preset's published name, and contents to match."""
        spec = adapter.spec
        return published.encoder(spec.features, spec.feature_dim) is published.VIT_H and any(
            other.is_published_name(adapter, spec) and other.asks_for(spec)
            for other in ADAPTER_PRESETS.values()
            if other != preset
        )

    return (
        Criterion(
            "its name is not the published one of another preset", lambda a: not another_presets(a)
        ),
        Criterion(
            "its own image encoder is here",
            lambda a: any(own(a, encoder) for encoder in readable[a]),
            certain=True,
        ),
        Criterion(
            "its image encoder is the smaller one", lambda a: -a.spec.feature_dim, certain=True
        ),
        Criterion(
            "it makes more tokens of an image",  # XLabs' second version
            lambda a: 0 if a.spec.place == CROSS_ATTENTION else a.spec.tokens or 0,
            certain=True,
        ),
        Criterion(word, preset.suits),
        Criterion("its name is the published one", lambda a: published.is_name(a.name)),
        Criterion("it is a .safetensors file", lambda a: a.name.endswith(".safetensors")),
    )


def _of_encoders(adapter: AdapterFile) -> Sequence[Criterion]:
    return (
        Criterion(
            "it is the one that the adapter was trained with",
            lambda e: own(adapter, e),
            certain=True,
        ),
        Criterion(
            "it is of a published encoder's sizes",
            lambda e: any(map(e.has_sizes, published.encoders(adapter.spec.place).values())),
            certain=True,
        ),
        Criterion("its name is the published one", lambda e: published.is_name(e.name)),
        Criterion("ComfyUI reads it itself", lambda e: e.sizes.layout == "transformers"),
        Criterion("it holds no text tower", lambda e: e.sizes.alone),
    )


def _best(files: Iterable[Any], criteria: Sequence[Criterion]) -> tuple[Any, str, list[str]]:
    """Return the best file, what made it better than the next, and a doubt where names decided.

    The first criterion that tells two files apart decides between them, in the end the alphabet.
    """
    first, *others = sorted(
        sorted(files, key=lambda file: file.name),
        key=lambda file: [criterion.score(file) for criterion in criteria],
        reverse=True,
    )
    why = _decided(first, others[0], criteria).why if others else ""
    rivals = [
        f"'{file.name}'"
        for file in others
        if file.stem != first.stem and not _decided(first, file, criteria).certain
    ]
    if not rivals:
        return first, why, []
    shown = ", ".join(rivals[:3]) + (f" and {len(rivals) - 3} more" if len(rivals) > 3 else "")
    doubt = (
        f"{shown} {'fits' if len(rivals) == 1 else 'fit'} as well as '{first.name}', so that only "
        "names, formats and layouts could decide"
    )
    return first, why, [doubt]


def _decided(one: File, other: File, criteria: Sequence[Criterion]) -> Criterion:
    different = (c for c in criteria if c.score(one) != c.score(other))
    return next(different, Criterion("its name comes first", lambda _: 0))


def _kind_doubt(chosen: AdapterFile, preset: AdapterPreset) -> Iterator[str]:
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
    others: Iterable[File],
    criteria: Sequence[Criterion],
    readable: Mapping[AdapterFile, Sequence[EncoderFile]],
    preset: AdapterPreset,
) -> Iterator[str]:
    """Say of files whose names promise more than the chosen one's why none of them was taken."""

    def promise(file: File) -> tuple[bool, bool]:
        return preset.suits(file), preset.is_published_name(file, chosen.spec)

    for file in others:
        if promise(file) <= promise(chosen):
            continue
        if isinstance(file, Unusable):
            reason = file.reason.rstrip(".")
        elif file in readable:
            reason = f"of '{chosen.name}', {_decided(chosen, file, criteria).why}"
        else:
            reason = f"no image encoder that gives {_features(file.spec)} is here"  # type: ignore[attr-defined]
        yield (
            f"'{file.name}', whose name is as expected of the preset '{preset.name}', was passed "
            f"over: {reason}"
        )


def _features(spec: AdapterSpec) -> str:
    """Describe the features that an adapter reads."""
    label = published.encoder_label(spec.features, spec.feature_dim)
    width = f"{spec.features.replace('_', ' ')} {spec.feature_dim} wide"
    return f"{width} ({label})" if label else width


# What to say where the files are not all there


@dataclass(frozen=True)
class Search:
    """What was sought for a model, and all that was seen.

    The model has `layers` cross-attention layers over `context_dim`-wide text states; `kolors`: see
    `describe_model`. The folders' files are those that `adapters` and `encoders` returned.
    """

    model: str
    context_dim: int
    layers: int
    kolors: bool
    preset: AdapterPreset
    adapters: Folder
    encoders: Folder
    place: Place = CROSS_ATTENTION

    def message(self, fitting: Sequence[AdapterFile]) -> str:
        """Say what is missing and where to get it.

        `fitting`: those adapters that suit model and preset; if there are some, it is the encoder
        that is missing.
        """
        return "\n".join(self._no_encoder(fitting) if fitting else self._no_adapter())

    def _no_adapter(self) -> Iterator[str]:
        preset, sizes = self.preset, (self.context_dim, self.layers, self.kolors)
        variant = preset.variant_at(self.place) or preset.variant
        yield (
            f"No IP-Adapter for the preset '{preset.name}' and the connected model ({self.model}) "
            f"was found. Sought: a {VARIANT_LABELS[variant]} adapter (with a tensor "
            f"'image_proj.{adapter_file.SIGNATURES[variant]}') for "
            f"{describe_model(*sizes, self.place)}."
        )
        label, offered = model_label(*sizes), published.adapters(*sizes)
        wanted = offered.get(preset.name)
        yield from _instead(self.adapters, wanted)
        if not offered:
            yield (
                f"No adapter is published for {label or 'models of these sizes'}, only for "
                f"{' and '.join(FAMILY_LABELS.values())}. Connect such a model, or put an adapter "
                "trained for this one into the folder."
            )
        elif wanted is None:
            yield (
                f"For {label} no '{preset.name}' adapter is published. There are: "
                f"{', '.join(offered)}. Choose one of these presets."
            )
        else:
            yield _download(wanted, self.adapters)
            if preset.variant == "faceid":
                yield (
                    "It reads no image encoder, but a face encoder: put insightface's model pack "
                    "buffalo_l into models/insightface/models."
                )
            elif not any(map(self._serves, self.encoders.files)):
                yield "It also needs an image encoder, which is missing too:"
                yield _download(self._encoder, self.encoders)

    @property
    def _encoder(self) -> published.Weights:
        return published.VIT_L_336 if self.kolors else self.preset.encoder(self.place)

    def _serves(self, file: File) -> bool:
        """Return whether the preset's published adapter can use it."""
        if not isinstance(file, EncoderFile) or not file.has_sizes(self._encoder):
            return False
        return self.preset.variant != "base" or file.sizes.embed_dim > 0

    def _no_encoder(self, fitting: Sequence[AdapterFile]) -> Iterator[str]:
        ranked = sorted(
            fitting, key=lambda a: (not self.preset.suits(a), a.spec.feature_dim, a.name)
        )
        first = ranked[0]
        kind = "CLIP" if self.place == CROSS_ATTENTION else "CLIP or SigLIP"
        needs: dict[str, str] = {}  # one example for each kind of encoder
        for adapter in ranked:
            features = _features(adapter.spec)
            needs.setdefault(features, f"{features}, for '{adapter.name}'")
        yield (
            f"An IP-Adapter for the preset '{self.preset.name}' and the connected model "
            f"({self.model}) is here, '{first.name}', but no image encoder for it was found. "
            f"Sought: a {kind} image encoder that gives {'; or '.join(needs.values())}."
        )
        wanted = expected_encoder(first.spec, first.trained_with)
        yield from _instead(self.encoders, wanted)
        if wanted is not None:
            yield _download(wanted, self.encoders)
        else:
            named = f" ('{first.trained_with}')" if first.trained_with else ""
            yield f"Put the encoder that the adapter was trained with{named} into the folder."


def _instead(folder: Folder, wanted: published.Weights | None) -> Iterator[str]:
    """Say what lies there: first what may be the `wanted` file, then all that cannot be used."""

    def place(file: File) -> tuple[bool, bool]:
        named = wanted is not None and PurePath(file.name).stem == PurePath(wanted.name).stem
        return not named, not isinstance(file, Unusable)

    yield f"Searched: {', '.join(folder.paths) or 'no folder is known'}."
    if not folder.files:
        yield "There is no model file."
        return
    yield "Found there instead:"
    yield from (f"- {file}" for file in sorted(folder.files, key=place)[:_SHOWN])
    if len(folder.files) > _SHOWN:
        yield f"- and {len(folder.files) - _SHOWN} more"


def _download(weights: published.Weights, folder: Folder) -> str:
    into = folder.paths[0] if folder.paths else os.path.join("models", weights.directory)
    return f"Download {weights.url} and save it as {os.path.join(into, weights.name)}"
