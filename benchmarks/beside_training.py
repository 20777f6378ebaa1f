"""Steps of train.py's own loop, and others between them.

They are timed from the end of one `Trainer.after_step` to the end of the next, so with all that the
loop does: the loader, which reads in this process, the meter, the schedule, the progress bar.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from training.config import TrainConfig
from training.loss import Batch
from training.trainer import Trainer

NOT_TIMED = 5  # steps at the start
Partner = Callable[[Trainer, Batch], float]


def config(folder: Path, **settings: Any) -> TrainConfig:
    """Configure a new run on the `base` and `encoder` in `folder`, its data read in this process.

    accelerate keeps its state in classes, which is reset.
    """
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    given: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "image_encoder_path": str(folder / "encoder"),
        "output_dir": tempfile.mkdtemp(dir=folder),
        "dataloader_num_workers": 0,
    }
    return TrainConfig(**(given | settings))


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for each other count as work, and others' programs make them wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(given: TrainConfig, partner: Partner) -> list[tuple[float, float]]:
    """Time each step of train.py's loop but the first ones beside `partner` with the same batch.

    Returns:
        CPU seconds of a step, and the mean of the partner's call before and the one after it.
    """
    ours: list[float] = []
    theirs: list[float] = []
    batches: list[Batch] = []
    after_step, began = Trainer.after_step, 0.0

    def noting(found: Iterator[Batch]) -> Iterator[Batch]:
        for batch in found:
            batches[:] = [batch]
            yield batch

    def measured(trainer: Trainer, bar: Any) -> None:
        nonlocal began
        after_step(trainer, bar)
        ours.append(time.process_time() - began)
        if not batches:
            trainer.batches = noting(trainer.batches)
        else:
            theirs.append(partner(trainer, batches[0]))
        began = time.process_time()

    with patch.object(Trainer, "after_step", measured):
        Trainer(given).train()
    between = [sum(pair) / 2 for pair in pairwise(theirs)]
    return list(zip(ours[2:], between, strict=True))[NOT_TIMED - 2 :]


def seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
