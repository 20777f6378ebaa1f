"""Which image encoder an adapter was trained with: as its metadata says, else as sizes tell."""

from __future__ import annotations

from .. import compatibility
from ..adapter import AdapterSpec
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
    trained = compatibility.words(adapter.trained_with)
    return not trained or compatibility.within(trained, compatibility.words_of_file(encoder.name))


def expected(adapter: AdapterFile) -> published.Weights | None:
    """The published encoder that the adapter was trained with; None where it is another one, or
    nothing tells."""
    return compatibility.expected_encoder(adapter.spec, adapter.trained_with)


def is_of(encoder: EncoderFile, weights: published.Weights) -> bool:
    """Whether it has sizes and activation of the published encoder; the projection may be left
    out."""
    sizes = encoder.sizes
    return not sizes.quick_gelu and published.has_sizes(
        weights, sizes.embed_dim, sizes.hidden_dim, sizes.positions
    )


def read_by(spec: AdapterSpec) -> str:
    """The features that an adapter reads."""
    encoder = published.encoder_label(spec.features, spec.feature_dim)
    width = f"{spec.features.replace('_', ' ')} {spec.feature_dim} wide"
    return f"{width} ({encoder})" if encoder else width
