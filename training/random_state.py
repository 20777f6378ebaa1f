"""Work on the side that leaves every generator of random numbers where it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Afterwards Python's, numpy's and torch's generators are where they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    # Only this process's device: asking the others would open them.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
