"""What an image prompt adds to sampling, counted in dispatched operations.

A kernel is an operation that computes or copies; views cost nothing on the device and are left
out. Counts are differences: with the prompt minus without, N + 1 steps minus N.
"""

from __future__ import annotations

import gc
import importlib
from collections import Counter
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from .world import World, sample, thirds

SIZE = 16  # latents; counts do not depend on it
LAYERS = 16
SYNC = "_local_scalar_dense"  # .item(), float(), bool(): the host waits for the device
VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze"),
    *("slice", "select", "detach", "alias", "reshape", "split", "split_with_sizes", "chunk"),
    *("_reshape_alias", "unbind", "as_strided", "unsafe_split", "unflatten", "narrow"),
}


class Trace(TorchDispatchMode):
    """Counts every operation that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket._qualified_op_name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def per_step(model: Any) -> Counter[str]:
    """Operations of one sampling step, without what a run costs once."""
    counts = []
    for steps in (2, 3):
        with Trace() as trace:
            sample(model, steps, SIZE)
        counts.append(trace.calls)
    return Counter({k: n - counts[0][k] for k, n in counts[1].items()})


def added(with_prompt: Counter[str], without: Counter[str]) -> tuple[int, int]:
    """(kernels, synchronisations) that the prompt adds to a step."""
    names = with_prompt.keys() | without.keys()
    difference = {name: with_prompt[name] - without[name] for name in names}
    syncs = difference.pop(SYNC, 0)
    return sum(n for name, n in difference.items() if name not in VIEWS), syncs


def measure(world: World) -> dict[str, float]:
    base = per_step(world.model)
    one, syncs = added(per_step(world.apply(world.model)), base)
    masked, mask_syncs = added(per_step(world.apply(world.model, mask=thirds()[0])), base)
    curve = {"weight_curve": [[i / 10, (i % 3) / 2] for i in range(11)]}  # ten pieces
    curved, curve_syncs = added(per_step(world.apply(world.model, **curve)), base)
    window = {"start_at": 1.0, "end_at": 1.0}
    outside, window_syncs = added(per_step(world.apply(world.model, **window)), base)
    return {
        "kernels_per_layer": one / LAYERS,
        "kernels_per_layer_mask": masked / LAYERS,
        "kernels_per_layer_curve": curved / LAYERS,
        "syncs_per_step": max(syncs, mask_syncs, curve_syncs),
        "syncs_per_step_windowed": window_syncs,
        "kernels_outside_window": outside,
        "resident_adapter_parameters": resident_parameters(world),
    }


def resident_parameters(world: World) -> int:
    """Adapter parameters that the sampled model or one that the host keeps loaded can reach, seen
    from within a UNet call and after sampling."""
    sizes = {id(p): p.numel() for p in world.adapter.module.parameters()}
    management = importlib.import_module("comfy.model_management")
    model = world.apply(world.model)
    found: list[int] = []

    def count() -> None:
        loaded = [entry.model for entry in management.current_loaded_models]
        found.append(sum(sizes.get(id(thing), 0) for thing in reachable(model, *loaded)))

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:  # holds nothing of the adapter
        count()
        return executor(*args, **kwargs)

    wrappers = importlib.import_module("comfy.patcher_extension").WrappersMP
    model.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, "benchmark", look)
    sample(model, 1, SIZE)
    count()
    return max(found)


def reachable(*roots: Any) -> Iterable[Any]:
    """Everything that these objects hold, as the garbage collector sees it. Not through modules,
    classes and functions' globals: by way of those, everything reaches everything."""
    seen: dict[int, Any] = {}
    queue = list(roots)
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType)):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, FunctionType):
            queue += thing.__closure__ or (), thing.__defaults__ or (), thing.__dict__
        else:
            queue += gc.get_referents(thing)
    return seen.values()
