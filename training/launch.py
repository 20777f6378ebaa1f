"""What `accelerate launch` leaves undone on CPUs: starting several processes, telling its end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta

import psutil
import torch
from accelerate import PartialState

from .errors import TrainingError

PR_SET_PDEATHSIG = 1  # prctl(2)


def begin(patience: timedelta = timedelta(hours=1)) -> PartialState:
    """The processes of this launch; to be called first by every script. `patience` is how long one
    may wait for another before both are ended.

    Raises TrainingError if the number of processes that was asked for cannot be told.
    """
    launcher = _launcher()
    if launcher is not None:
        _follow(launcher)
    # accelerate takes processes on CPUs for a group only if told so when it is first asked.
    on_cpu = _asked_for_cpu() or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=patience)


def _follow(launcher: Sequence[str]) -> None:
    if sys.platform == "linux":
        # A scheduler's SIGTERM ends `accelerate launch`, which would leave this process training.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    wanted = _processes(launcher)
    if wanted > 1:
        _start(wanted)


def _launcher() -> Sequence[str] | None:
    """The command line of the `accelerate launch` that started this one process."""
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None  # torchrun started it, or nobody
    try:
        command = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    except (psutil.Error, AttributeError):
        return None
    return command if any("accelerate" in part for part in command[:4]) else None


def _processes(command: Sequence[str]) -> int:
    """`--num_processes` of a launch on CPUs, for which accelerate starts one process."""
    several = "MASTER_ADDR" in os.environ  # accelerate sets it for more than one
    if not (several and _asked_for_cpu()):
        return 1
    for part, following in zip(command, [*command[1:], ""], strict=True):
        name, _, value = part.partition("=")
        if name in ("--num_processes", "--num-processes"):
            return int(value or following)
    raise TrainingError(
        "accelerate started one process of several on CPUs, and how many is not on its command "
        "line. Give --num_processes there, or start them with torchrun --nproc_per_node."
    )


def _asked_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def _start(processes: int) -> None:
    """Become torchrun, which starts them."""
    os.execv(
        sys.executable,
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(processes)),
            *sys.argv,
        ],
    )
