"""The adapters that are measured, each seen to fit before anything is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ip_adapter_core.adapter import IPAdapter
from ip_adapter_core.files import adapter_file
from ip_adapter_core.files.header import CheckpointError
from ip_adapter_core.variants import FACE, VARIANT_LABELS

from ..errors import TrainingError
from ..models.image_encoder import ImageEncoder
from ..unet import cross_attention_layers
from .report import Subject


def load(paths: Sequence[str]) -> list[tuple[Subject, IPAdapter]]:
    """Load adapters in float32. Raises TrainingError if a file is none, or the same one twice."""
    names = [Path(path).name for path in paths]
    loaded: list[tuple[Subject, IPAdapter]] = []
    for path, name in zip(paths, names, strict=True):
        try:
            adapter = adapter_file.load(path).float().eval().requires_grad_(False)
        except CheckpointError as error:
            raise TrainingError(str(error)) from error
        if FACE in adapter.spec.reads:
            raise TrainingError(
                f"'{path}' reads faces ({VARIANT_LABELS[adapter.spec.variant]}), but what is "
                "measured here is how alike whole images are, on sets that are not of faces. Give "
                "base, plus or full adapters; look at this one's samples in ComfyUI, or at the "
                "validation of its training."
            )
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if any(subject.digest == digest for subject, _ in loaded):
            raise TrainingError(f"'{path}' is given twice, or is a copy of another of the files.")
        parameters = sum(parameter.numel() for parameter in adapter.parameters())
        shown = name if names.count(name) == 1 else str(path)
        loaded.append((Subject(shown, digest, adapter.spec.variant, parameters), adapter))
    return loaded


def check_fits(adapter: IPAdapter, name: str, unet: Any, encoder: ImageEncoder) -> None:
    """Raise TrainingError unless the adapter reads this encoder and fits this UNet's layers."""
    spec = adapter.spec
    layers = cross_attention_layers(unet).values()
    found = unet.config.cross_attention_dim, tuple(layer.to_k.out_features for layer in layers)
    if found != (spec.cross_attention_dim, spec.layer_dims):
        raise TrainingError(
            f"'{name}' was made for a UNet of {len(spec.layer_dims)} cross-attention layers over "
            f"{spec.cross_attention_dim}-wide text states, but the base has {len(found[1])} over "
            f"{found[0]}-wide ones, or of other widths. Give a base of the adapter's family "
            "(SD1.5 or SDXL)."
        )
    given = encoder.feature_dim(spec.features)
    if given != spec.feature_dim:
        kind = spec.features.replace("_", " ")
        raise TrainingError(
            f"'{name}' reads {kind} {spec.feature_dim} wide, but those of '{encoder.name}' are "
            f"{given} wide. Give the image encoder that this adapter was trained with."
        )
