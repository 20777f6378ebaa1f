"""What to say where the files that a model and a preset need are not all there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from ..variants import FAMILY_LABELS, VARIANT_LABELS, describe_model, family, model_label
from . import published
from .adapter_file import SIGNATURES
from .catalogue import AdapterFile, EncoderFile, File, Folder, Unusable
from .choice import Preset
from .origin import expected, is_of, read_by

_SHOWN = 5  # of the files found instead


@dataclass(frozen=True)
class Search:
    """What was sought for a model of `count` cross-attention layers over `context_dim`-wide text
    states, and all that was seen."""

    model: str
    context_dim: int
    count: int
    preset: Preset
    adapter_folder: Folder
    encoder_folder: Folder
    adapters: Sequence[File]
    encoders: Sequence[File]

    def message(self, fitting: Sequence[AdapterFile]) -> str:
        """`fitting`: those adapters that suit model and preset; if there are some, it is the
        encoder that is missing."""
        return "\n".join(self._no_encoder(fitting) if fitting else self._no_adapter())

    def _no_adapter(self) -> Iterator[str]:
        preset, made_for = self.preset, describe_model(self.context_dim, self.count)
        yield (
            f"No IP-Adapter for the preset '{preset.name}' and the connected model ({self.model}) "
            f"was found. Sought: a {VARIANT_LABELS[preset.variant]} adapter (with a tensor "
            f"'image_proj.{SIGNATURES[preset.variant]}') for {made_for}."
        )
        name = model_label(self.context_dim, self.count)
        known = family(self.context_dim, self.count)
        offered = published.ADAPTERS[known] if known else {}
        yield from _found(self.adapter_folder, self.adapters, offered.get(preset.name))
        if not offered:
            yield (
                f"No adapter is published for {name or 'models of these sizes'}, only for "
                f"{' and '.join(FAMILY_LABELS.values())}. Connect such a model, or put an adapter "
                "trained for this one into the folder."
            )
        elif preset.name not in offered:
            yield (
                f"For {name} no '{preset.name}' adapter is published. There are: "
                f"{', '.join(offered)}. Choose one of these presets."
            )
        else:
            yield _download(offered[preset.name], self.adapter_folder)
            if not any(map(self._serves, self.encoders)):
                yield "It also needs an image encoder, which is missing too:"
                yield _download(published.VIT_H, self.encoder_folder)

    def _serves(self, file: File) -> bool:
        """Whether the preset's published adapter can use it; all of those read ViT-H."""
        if not isinstance(file, EncoderFile) or not is_of(file, published.VIT_H):
            return False
        return self.preset.variant != "base" or file.sizes.embed_dim > 0

    def _no_encoder(self, fitting: Sequence[AdapterFile]) -> Iterator[str]:
        ranked = sorted(
            fitting, key=lambda a: (not self.preset.suits(a), a.spec.feature_dim, a.name)
        )
        first = ranked[0]
        needs: dict[str, str] = {}  # one example for each kind of encoder
        for adapter in ranked:
            read = read_by(adapter.spec)
            needs.setdefault(read, f"{read}, for '{adapter.name}'")
        yield (
            f"An IP-Adapter for the preset '{self.preset.name}' and the connected model "
            f"({self.model}) is here, '{first.name}', but no image encoder for it was found. "
            f"Sought: a CLIP image encoder that gives {'; or '.join(needs.values())}."
        )
        public = expected(first)
        yield from _found(self.encoder_folder, self.encoders, public)
        if public is not None:
            yield _download(public, self.encoder_folder)
        else:
            named = f" ('{first.trained_with}')" if first.trained_with else ""
            yield f"Put the encoder that the adapter was trained with{named} into the folder."


def what(file: File) -> str:
    """A file, and what it is."""
    match file:
        case AdapterFile(name=name, spec=spec):
            made_for = describe_model(spec.cross_attention_dim, len(spec.layer_dims))
            return (
                f"'{name}': a {VARIANT_LABELS[spec.variant]} IP-Adapter for {made_for}; reads "
                f"{read_by(spec)}"
            )
        case EncoderFile(name=name, sizes=sizes):
            embeds = f"{sizes.embed_dim} wide" if sizes.embed_dim else "none"
            hidden = f"{sizes.hidden_dim} wide" if sizes.hidden_dim else "none"
            return (
                f"'{name}': an image encoder in the layout of {sizes.layout}; image embeds "
                f"{embeds}, penultimate hidden states {hidden}"
            )
        case Unusable(reason=reason):
            return reason
    return f"'{file.name}'"


def _found(
    folder: Folder, files: Iterable[File], wanted: published.Weights | None
) -> Iterator[str]:
    """What lies there: what may be the `wanted` file first, then all that cannot be used."""

    def place(file: File) -> tuple[bool, bool]:
        named = wanted is not None and PurePath(file.name).stem == PurePath(wanted.name).stem
        return not named, not isinstance(file, Unusable)

    files = sorted(files, key=place)
    yield f"Searched: {', '.join(folder.paths) or 'no folder is known'}."
    if not files:
        yield "There is no model file."
        return
    yield "Found there instead:"
    yield from (f"- {what(file)}" for file in files[:_SHOWN])
    if len(files) > _SHOWN:
        yield f"- and {len(files) - _SHOWN} more"


def _download(weights: published.Weights, folder: Folder) -> str:
    into = folder.paths[0] if folder.paths else os.path.join("models", weights.directory)
    return f"Download {weights.url} and save it as {os.path.join(into, weights.name)}"
