"""Log loss, throughput and unreadable images."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from .errors import TrainingError

NAMED = 20  # broken images named in the log; the file names all

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Log means over `every` steps, to the progress bar and the trackers.

    A loss is copied to the CPU when it is there and looked at one batch later, so that nothing
    waits for the device.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, every: int) -> None:
        self.accelerator, self.every = accelerator, every
        self._broken_file = output_dir / f"broken-pictures-{accelerator.process_index}.txt"
        self._broken: set[str] = set()
        self._unchecked: Tensor | None = None
        self._copied = torch.cuda.Event() if accelerator.device.type == "cuda" else None
        self._start()

    def _start(self) -> None:
        self._total: Tensor | float = 0.0
        self._batches = self._samples = 0
        self._waited, self._since = 0.0, time.perf_counter()

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
        self._note_broken(batch["broken"])

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
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.accelerator.log(values, step=step)
        self._start()

    def _note_broken(self, lines: list[str]) -> None:
        for line in lines:
            if line in self._broken:
                continue
            self._broken.add(line)
            with self._broken_file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            if len(self._broken) <= NAMED:
                logger.warning("left out: %s", line)
            if len(self._broken) == NAMED:
                logger.warning("further ones are named in '%s' only", self._broken_file)
