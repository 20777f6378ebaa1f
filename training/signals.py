"""Being asked to stop: by a scheduler (SIGTERM) or a person (Ctrl-C)."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

from accelerate import Accelerator

ASK_OTHERS_EVERY = 10  # steps: asking is a collective operation that every step would wait for

logger = logging.getLogger(__name__)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is a request; a second SIGINT acts as usual."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._asked = False
        self._before: dict[int, Any] = {}

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

    def requested(self, step: int) -> bool:
        """Whether any process was asked. All processes get the same answer at the same step."""
        if self.accelerator.num_processes == 1:
            return self._asked
        if step % ASK_OTHERS_EVERY:
            return False
        if self._asked:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())
