"""Checkpoints of a run: written whole or not at all, the last few kept, found again.

    OUTPUT_DIR/ip-adapter.safetensors           the adapter of the last checkpoint: the file to use
    OUTPUT_DIR/checkpoints/step-0002000/
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
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ip_adapter_core.files import adapter_file
from ip_adapter_core.files.atomic import sync

from .config import TrainConfig
from .errors import TrainingError

RUN, ADAPTER = "run.json", "adapter.safetensors"
_NAME = re.compile(r"step-(\d{7,})")

logger = logging.getLogger(__name__)


class NotWrittenError(TrainingError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints in `output_dir`, of which `limit` stay. Raises TrainingError."""

    def __init__(self, output_dir: str, limit: int, accelerator: Accelerator) -> None:
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / "checkpoints"
        self.limit = limit
        self.accelerator = accelerator
        if accelerator.is_main_process:
            self._claim()
        accelerator.wait_for_everyone()
        if not self.folder.is_dir():
            raise TrainingError(
                f"Process {accelerator.process_index} does not see '{self.folder}', which the main "
                "process made. Give --output_dir a folder on a disk that all machines share."
            )

    def _claim(self) -> None:
        make_writable(self.folder)
        try:
            for leftover in self.folder.glob(".step-*"):  # of one that was killed while saving
                shutil.rmtree(leftover)
            for last in self.steps()[-1:]:  # it may have been killed just before this
                self._publish(self.path(last))
        except OSError as error:
            raise _not_writable(self.folder, error) from error

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that exist, oldest first."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:07}"

    def run(self, step: int) -> dict[str, Any]:
        """Return what `save` was given as `run`."""
        return dict(json.loads((self.path(step) / RUN).read_text(encoding="utf-8")))

    @property
    def newest(self) -> Path:
        """The adapter of the last checkpoint."""
        return self.output_dir / "ip-adapter.safetensors"

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        run: Mapping[str, Any],
    ) -> None:
        """Write the state of all prepared and registered objects; every process calls this.

        `weights`: the adapter's tensors, by their official keys; `metadata`: of its file; `run`:
        what stays beside it. Raises NotWrittenError in all processes if one cannot write.
        """
        path = self.path(step)
        partial = path.with_name(f".{path.name}.partial")
        error: BaseException | None = None
        try:
            self.accelerator.save_state(str(partial))
            if self.accelerator.is_main_process:
                adapter_file.save(weights, partial / ADAPTER, dict(metadata))
                (partial / RUN).write_text(json.dumps(dict(run), indent=1), encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as failed:
            error = failed
        failure = "" if error is None else _reason(error)
        reason = next(filter(None, gather_object([failure])), "")  # all have written, or given up
        if self.accelerator.is_main_process:
            if reason:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                reason = self._finish(partial, path)
        (reason,) = broadcast_object_list([reason])
        if not reason:
            return
        free = shutil.disk_usage(self.folder).free / 2**20
        steps = self.steps()
        kept = f"The checkpoint of step {steps[-1]} is whole" if steps else "There is none yet"
        raise NotWrittenError(
            f"The checkpoint of step {step} could not be written to '{self.folder}': {reason} "
            f"({free:.0f} MiB free). {kept}. Make room and run the same command again."
        ) from error

    def _finish(self, partial: Path, path: Path) -> str:
        """Give a whole folder its name; return what went wrong, or nothing."""
        try:
            for file in (*partial.rglob("*"), partial):
                sync(file)
            if path.exists():  # saved at this very step already
                self._delete(path)
            os.rename(partial, path)
            sync(self.folder)
            self._publish(path)
            for old in self.steps()[: -self.limit]:
                self._delete(self.path(old))
        except OSError as error:
            return _reason(error)
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


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), repr(error))


def make_writable(folder: Path) -> None:
    """Make `folder`; raise TrainingError now if it cannot be written to, not at its first file."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"Nothing can be written to '{folder}': {error.strerror}. Give --output_dir a folder that "
        "this user may write to."
    )


def check_same_run(
    stored: Mapping[str, Any], config: TrainConfig, identity: Mapping[str, Any]
) -> None:
    """Raise TrainingError if the stored run was another: resuming would give neither.

    `stored`: what `save` was given as `run`; `identity`: fingerprints of data and models.
    """
    now = json.loads(json.dumps({**config.identity(), **identity}))  # as it would be read back
    # Of an option that was not there yet when the run began, today's default is what it did.
    begun = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    before = {**begun, **stored["settings"], **stored["identity"]}
    different = [name for name, value in now.items() if before.get(name) != value]
    if different:
        listed = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in different)
        raise TrainingError(
            f"'{config.output_dir}' holds a run with other options, at step {stored['step']}: "
            f"{listed}. Give the same ones to resume it. To train on with these, start from its "
            "adapter: --pretrained_ip_adapter_path "
            f"{Path(config.output_dir, 'ip-adapter.safetensors')} and another --output_dir."
        )
