"""The pack's own share of the sampling time: a ratio that one run tells by itself.

Two runs beside each other differ by some percent for reasons of the machine. Here the pack's code
is timed inside the run that it is part of, less what it calls of the host's, so that the speed of
the machine cancels; what it does to the host's caches is not seen.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from tools.comfyui import install as host

from .full_size import Setup

WRAPPERS = ("prepare_run", "prompts_at_step", "inject_decoupled_attention")
ROWS = ("process_cond", "can_concat", "size", "concat")  # methods that the host calls


class Clock:
    """CPU seconds of all threads, `own` those spent in the pack."""

    def __init__(self) -> None:
        self.own = 0.0

    def ours(self, function: Callable[..., Any]) -> Any:
        return self._counting(+1)(function)

    def theirs(self, function: Callable[..., Any]) -> Any:
        """To be called from ours only."""
        return self._counting(-1)(function)

    @contextmanager
    def _counting(self, sign: int) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self.own += sign * (time.process_time() - start)


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """Models that are made and sampled herein are timed by `clock`."""
    comfyui = f"{host.PACK}.ip_adapter_core.comfyui"
    registering: Any = importlib.import_module(f"{comfyui}.apply")
    layer: Any = importlib.import_module(f"{comfyui}.decoupled_attention")
    rows: Any = importlib.import_module(f"{comfyui}.prompt_rows").PromptRows

    def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            uncounted = clock.theirs(executor)
            uncounted.class_obj = executor.class_obj
            return function(uncounted, *args, **kwargs)

        return clock.ours(timed_wrapper)

    class Timed(layer.DecoupledAttention):
        __call__ = clock.ours(layer.DecoupledAttention.__call__)

    replaced = [(registering, name, wrapper(getattr(registering, name))) for name in WRAPPERS]
    replaced += [(rows, name, clock.ours(vars(rows)[name])) for name in ROWS]
    replaced.append((layer, "DecoupledAttention", Timed))
    replaced.append((layer, "optimized_attention", clock.theirs(layer.optimized_attention)))
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        yield


def measure(setup: Setup, rounds: int) -> dict[str, float]:
    """Return the median of sampling time over sampling time less the pack's own: `own_one` etc."""
    clock = Clock()

    def ratio(model: Any) -> float:
        clock.own, start = 0.0, time.process_time()
        setup.sample(model)
        took = time.process_time() - start
        return took / (took - clock.own)

    with timed(clock):
        models = setup.variants()
        setup.sample(setup.model)  # warm-up
        return {
            f"own_{name}": statistics.median(ratio(model) for _ in range(rounds))
            for name, model in models.items()
        }
