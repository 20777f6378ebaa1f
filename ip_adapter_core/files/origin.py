"""Which image encoder an adapter was trained with: as its metadata says, else as sizes tell."""

from __future__ import annotations

from .. import encoder_names
from ..adapter import AdapterSpec
from ..prompt import encoder_name
from . import published
from .catalogue import AdapterFile, EncoderFile


def own(adapter: AdapterFile, encoder: EncoderFile) -> bool:
    """Whether the adapter was trained with this encoder, as far as can be told.

    A name in its metadata that is of a published encoder goes by that encoder's sizes; another one
    has to be in the name of the encoder's file. Where there is none, or one that any encoder may
    have, it is the published encoder whose features are as wide as the adapter's.
    """
    wanted = expected(adapter)
    if wanted is not None:
        return is_of(encoder, wanted)
    trained = encoder_names.words(adapter.trained_with)
    return not trained or encoder_names.within(trained, encoder_names.words_of_file(encoder.name))


def expected(adapter: AdapterFile) -> published.Weights | None:
    """The published encoder that the adapter was trained with; None where it is another one, or
    nothing tells."""
    return encoder_names.expected(adapter.trained_with, adapter.spec)


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
