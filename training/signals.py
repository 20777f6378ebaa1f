"""Being asked to stop: by a scheduler (SIGTERM) or a person (Ctrl-C)."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

logger = logging.getLogger(__name__)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is a request; a second SIGINT acts as usual."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, accelerator: Accelerator) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}
        # On CPUs, beside the one that gradients go through: asking each step makes no GPU wait.
        self._group: Any = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("%s: saving after this step", signal.Signals(number).name)

    def requested(self) -> bool:
        """Whether any process was asked. All get the same answer at the same step."""
        if self._group is None:
            return self._asked
        asked = torch.tensor(int(self._asked))
        dist.all_reduce(asked, group=self._group)
        return bool(asked)
