"""The loss over rows that are held out of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .loss import Batch
from .validation import preserved_rng_state


@torch.no_grad()
def validation_loss(batches: Iterable[Batch], loss: Callable[[Batch], Tensor]) -> float:
    """Return the mean loss of all samples that can be read, with nothing dropped.

    `batches` are this process's, `loss` gives a batch's mean; every process calls this, and all
    get the same. What is random of a sample comes with its batch: measured again, only `loss` has
    changed. NaN if no sample can be read.
    """
    total, samples = 0.0, 0
    with preserved_rng_state():
        for batch in batches:
            kept = {name: torch.zeros_like(batch[name]) for name in ("drop_image", "drop_text")}
            weight = batch["weight"]
            total += loss({**batch, **kept}).item() * len(weight)
            samples += int((weight > 0).sum())
        parts = gather_object([(total, samples)])
    totals, counts = zip(*parts, strict=True)
    return sum(totals) / sum(counts) if any(counts) else float("nan")
