"""Log loss, throughput and unreadable images."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from .errors import TrainingError
from .history import History

BROKEN = "broken-pictures-{}.txt"  # of a process
NAMED = 20  # broken images named in the log; the file names all

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Log means over `every` steps: to the trackers, and to the bar or, without one, as a line.

    A loss is copied to the CPU when it is there and looked at one batch later, so that nothing
    waits for the device.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, every: int, history: History
    ) -> None:
        self.accelerator, self.every, self.history = accelerator, every, history
        self._broken_file = output_dir / BROKEN.format(accelerator.process_index)
        self._broken: dict[str, None] = {}  # a set in order
        self._unchecked: Tensor | None = None
        self._copied = torch.cuda.Event() if accelerator.device.type == "cuda" else None
        self._total: Tensor | float = 0.0
        self._batches = 0
        self._start_clock()

    def state(self) -> list[dict[str, Any]]:
        """Return what every process has noted since it last logged; all call this."""
        broken, total = len(self._broken), float(self._total)
        return gather_object([{"total": total, "batches": self._batches, "broken": broken}])

    def resume(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state` gave, on as many processes or others; anew from nothing."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        named = 0
        if states:
            alike = [states[rank]] if len(states) == world else states
            self._total = fmean(state["total"] for state in alike)
            self._batches = states[0]["batches"]
            named = states[rank]["broken"] if rank < len(states) else 0
        if self._broken_file.exists():
            lines = self._broken_file.read_text(encoding="utf-8").split("\n")[:-1][:named]
            self._broken = dict.fromkeys(lines)
            self._broken_file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def begin(self) -> None:
        """Start the clocks: the first step begins now."""
        self.history.begin()
        self._start_clock()

    def _start_clock(self) -> None:
        self._samples, self._waited, self._since = 0, 0.0, time.perf_counter()

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the same batches, and measure the time until each is there."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except TrainingError as error:  # from a worker, with its traceback in the text
                text = str(error).rsplit("TrainingError: ", 1)[-1]
                raise TrainingError(text.strip()) from error
            self._waited += time.perf_counter() - start
            yield batch

    def add(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Note a batch; raise TrainingError if the loss of the one before was not finite."""
        self.check()
        self._total = self._total + loss.detach()
        if self._copied is None:
            self._unchecked = loss.detach()
        else:
            self._unchecked = torch.empty((), dtype=loss.dtype, pin_memory=True)
            self._unchecked.copy_(loss.detach(), non_blocking=True)
            self._copied.record()
        self._batches += 1
        self._samples += len(batch["weight"])
        self.note_broken(batch["broken"])

    def check(self) -> None:
        """Raise TrainingError if the last loss noted is not finite."""
        if self._unchecked is not None and self._copied is not None:
            self._copied.synchronize()
        if self._unchecked is not None and not math.isfinite(value := self._unchecked.item()):
            raise TrainingError(
                f"The loss became {value}. Nothing was saved since. The same command would come "
                "to the same point: start a new --output_dir from the last checkpoint "
                "(--pretrained_ip_adapter_path OUTPUT_DIR/ip-adapter.safetensors) with a lower "
                "learning_rate, with max_grad_norm 1, or, if mixed_precision is fp16, with bf16."
            )
        self._unchecked = None

    def report(self, step: int, learning_rate: float, bar: tqdm) -> None:
        """Advance the bar; every so many steps, log the means since the last time."""
        bar.update()
        if step % self.every:
            return
        mean = self.accelerator.reduce(
            torch.as_tensor(self._total / self._batches, device=self.accelerator.device), "mean"
        )
        seconds = time.perf_counter() - self._since
        values = {
            "loss": mean.item(),
            "learning_rate": learning_rate,
            "samples_per_second": self._samples * self.accelerator.num_processes / seconds,
            "waiting_for_data": self._waited / seconds,
            "broken_pictures": len(self._broken),
        }
        self.accelerator.log(values, step=step)
        self._say(values, step, bar)
        self._total, self._batches = 0.0, 0
        self._start_clock()

    def _say(self, values: Mapping[str, float], step: int, bar: tqdm) -> None:
        said = (
            f"loss {values['loss']:.4f}, learning rate {values['learning_rate']:.3g}, "
            f"{values['samples_per_second']:.3g} samples/s"
        )
        bar.set_postfix_str(said, refresh=False)
        if bar.disable and self.accelerator.is_main_process:  # no terminal
            left = bar.format_interval(self.history.seconds_left(step) or 0)
            logger.info("step %d of %d: %s, %s left", step, self.history.steps, said, left)

    def note_broken(self, lines: list[str]) -> None:
        """Name and count images that cannot be read, each once."""
        for line in lines:
            if line in self._broken:
                continue
            self._broken[line] = None
            with self._broken_file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            if len(self._broken) <= NAMED:
                logger.warning("left out: %s", line)
            if len(self._broken) == NAMED:
                logger.warning("further ones are named in '%s' only", self._broken_file)
