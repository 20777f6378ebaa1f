"""Checkpoints of a run: written whole or not at all, the last few kept, found again.

    OUT/ip-adapter.safetensors           the adapter of the last checkpoint: the file to use
    OUT/checkpoints/step-0002000/
        adapter.safetensors              the adapter then, official keys, fp16
        run.json                         step and settings
        model.safetensors, optimizer.bin, scheduler.bin, …   accelerate's state, to go on from

A folder gets its name when everything in it lies on the disk, and loses it before anything in it
is deleted: whenever the process is killed, a folder of that name is complete.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ip_adapter_core.files import adapter_file as checkpoint

from .errors import TrainingError

RUN, ADAPTER = "run.json", "adapter.safetensors"
_NAME = re.compile(r"step-(\d{7,})")

logger = logging.getLogger(__name__)


class NotWrittenError(TrainingError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints in `out`, of which `keep` stay.

    Raises TrainingError if `out` cannot be written.
    """

    def __init__(self, out: str | os.PathLike[str], keep: int, accelerator: Accelerator) -> None:
        self.out = Path(out)
        self.folder = self.out / "checkpoints"
        self.keep = keep
        self.accelerator = accelerator
        if accelerator.is_main_process:
            self._claim()
        accelerator.wait_for_everyone()
        if not self.folder.is_dir():
            raise TrainingError(
                f"Process {accelerator.process_index} does not see '{self.folder}', which the main "
                "process made. Give --out a folder on a disk that all machines share."
            )

    def _claim(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):  # of one that was killed while saving
                shutil.rmtree(leftover)
            for last in self.steps()[-1:]:  # it may have been killed just before this
                self._publish(self.path(last))
            probe = self.folder / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise TrainingError(
                f"Nothing can be written to '{self.out}': {error.strerror}. Give --out a folder "
                "that this user may write to."
            ) from error

    def steps(self) -> list[int]:
        """Steps of the checkpoints that exist, oldest first."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07}"

    def run(self, step: int) -> dict[str, Any]:
        """What `save` was given as `run`."""
        return dict(json.loads((self.path(step) / RUN).read_text(encoding="utf-8")))

    @property
    def newest(self) -> Path:
        """The adapter of the last checkpoint."""
        return self.out / "ip-adapter.safetensors"

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        run: Mapping[str, Any],
    ) -> None:
        """Write the state of all prepared and registered objects; every process calls this.

        `weights` and `metadata` go into the adapter file, `run` stays beside it.
        Raises NotWrittenError, in all processes, if any of them cannot write; earlier checkpoints
        are as they were.
        """
        path = self.path(step)
        partial = path.with_name(f".{path.name}.partial")
        error: BaseException | None = None
        try:
            self.accelerator.save_state(str(partial))
            if self.accelerator.is_main_process:
                checkpoint.save(weights, partial / ADAPTER, dict(metadata))
                (partial / RUN).write_text(json.dumps(dict(run), indent=1), encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as failed:
            error = failed
        failures = [_told(error)] if error is not None else [""]
        told = next(filter(None, gather_object(failures)), "")  # all have written, or given up
        if self.accelerator.is_main_process:
            if told:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                told = self._finished(partial, path)
        (told,) = broadcast_object_list([told])
        if told:
            raise NotWrittenError(self._failure(step, told)) from error

    def _finished(self, partial: Path, path: Path) -> str:
        """Give a whole folder its name; what went wrong, or nothing."""
        try:
            for file in (*partial.rglob("*"), partial):
                _to_disk(file)
            if path.exists():  # saved at this very step already
                self._delete(path)
            os.rename(partial, path)
            _to_disk(self.folder)
            self._publish(path)
            for old in self.steps()[: -self.keep]:
                self._delete(self.path(old))
        except OSError as error:
            return _told(error)
        return ""

    def _publish(self, path: Path) -> None:
        temporary = self.newest.with_name(self.newest.name + ".tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path / ADAPTER, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path / ADAPTER, temporary)
        os.replace(temporary, self.newest)

    def _delete(self, path: Path) -> None:
        nameless = path.with_name(f".{path.name}.old")
        os.rename(path, nameless)
        shutil.rmtree(nameless, ignore_errors=True)

    def _failure(self, step: int, found: str) -> str:
        free = shutil.disk_usage(self.folder).free / 2**20
        steps = self.steps()
        kept = f"The checkpoint of step {steps[-1]} is whole" if steps else "There is none yet"
        return (
            f"The checkpoint of step {step} could not be written to '{self.folder}': {found} "
            f"({free:.0f} MiB free). {kept}. Make room and run the same command again."
        )


def _told(error: BaseException) -> str:
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), repr(error))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
