"""The processes of a launch: their group, accelerate's object, the request to stop."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, LoggerType, ProjectConfiguration

from .config import TrainConfig
from .errors import TrainingError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PR_SET_PDEATHSIG = 1  # prctl(2)

logger = logging.getLogger(__name__)


@contextmanager
def script(name: str, patience: timedelta = timedelta(hours=1)) -> Iterator[PartialState]:
    """`begin`, for the body of a script, which a TrainingError ends with its message alone."""
    try:
        state = begin(patience)
        logging.basicConfig(format="%(message)s")
        level = logging.INFO if state.is_main_process else logging.WARNING
        logging.getLogger("training").setLevel(level)
        yield state
    except TrainingError as error:
        sys.exit(f"{name}: {error}")


def begin(patience: timedelta = timedelta(hours=1)) -> PartialState:
    """Join the processes of this launch, which wait `patience` for one another.

    Raises TrainingError if `accelerate launch` was asked for several on CPUs: it starts one.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ:
        _follow_launcher()
        if _true("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
            raise TrainingError(
                "accelerate launch starts one process on CPUs, however many were asked for. Give "
                f"--num_processes 1, or start N with `torchrun --nproc_per_node N {sys.argv[0]} …`."
            )
    # accelerate takes processes on CPUs for a group only if told so when it is first asked.
    on_cpu = _true("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=patience)


def _follow_launcher() -> None:
    """Let a scheduler's SIGTERM, which ends `accelerate launch` alone, reach this process."""
    if sys.platform != "linux":
        return
    parent = Path("/proc", str(os.getppid()), "cmdline").read_bytes().split(b"\0")
    if any(b"accelerate" in part for part in parent[:4]):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def sharded() -> bool:
    """Return whether DeepSpeed or FSDP split the adapter."""
    return _true("ACCELERATE_USE_DEEPSPEED") or _true("ACCELERATE_USE_FSDP")


def make_accelerator(config: TrainConfig, mixed_precision: str) -> Accelerator:
    """Build accelerate's object for a run. Raises TrainingError for what a user can mend."""
    if mixed_precision not in DTYPES:
        raise TrainingError(
            f"mixed_precision is '{mixed_precision}'; expected one of {', '.join(DTYPES)}. Give it "
            "with --mixed_precision, here or to accelerate launch."
        )
    if sharded() and mixed_precision == "fp16":
        raise TrainingError(
            "DeepSpeed and FSDP are used with bf16 or no mixed precision here: fp16 needs its loss "
            "scaled, which they would do to the adapter's weights too. Give --mixed_precision bf16."
        )
    whole = config.use_ema or config.validation_steps or config.variant == "faceid"
    if _true("ACCELERATE_USE_FSDP") and whole:
        raise TrainingError(
            "use_ema, validation_steps and the LoRA of faceid need the whole adapter in each "
            "process, which FSDP splits. Leave them out, or use training/configs/gpus.yaml: the "
            "adapter fits every GPU."
        )
    accelerator = Accelerator(
        # Those who split the adapter would make its weights half precision as well.
        mixed_precision="no" if sharded() else mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=_tracker(config.report_to),
        project_config=ProjectConfiguration(
            config.output_dir, str(Path(config.output_dir, "logs"))
        ),
        step_scheduler_with_optimizer=False,
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # it wants to know, and sees no loader to learn it from
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.max_grad_norm or 0.0,
        }
    return accelerator


def _tracker(name: str) -> str | None:
    """Check that accelerate, which passes over a tracker that is not installed, will log."""
    if name == "none":
        return None
    known, here = [*LoggerType.list()], [str(tracker) for tracker in get_available_trackers()]
    if name in known and name != "all" and name not in here:
        raise TrainingError(
            f"report_to is '{name}', but its package is not installed. Install it, or give one of "
            f"{', '.join(['none', *here])}."
        )
    if name not in known:
        raise TrainingError(
            f"report_to is '{name}'; expected none or one of accelerate's trackers: "
            f"{', '.join(known)}."
        )
    return name


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
        """Return whether any process was asked; all get the same answer at the same step."""
        if self._group is None:
            return self._asked
        asked = torch.tensor(int(self._asked))
        dist.all_reduce(asked, group=self._group)
        return bool(asked)
