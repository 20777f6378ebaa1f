"""What an image prompt adds to sampling, counted in dispatched operations.

A kernel is an operation that computes or copies; views cost nothing on the device and are left
out. Counts are differences: with the prompt minus without, N + 1 steps minus N.
"""

from __future__ import annotations

import gc
import importlib
from collections import Counter
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .world import World, sample

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
    mask = torch.zeros(1, 512, 512)
    mask[:, :, :256] = 1
    one, syncs = added(per_step(world.apply(world.model)), base)
    masked, mask_syncs = added(per_step(world.apply(world.model, mask=mask)), base)
    window = {"start_at": 1.0, "end_at": 1.0}
    outside, window_syncs = added(per_step(world.apply(world.model, **window)), base)
    return {
        "kernels_per_layer": one / LAYERS,
        "kernels_per_layer_mask": masked / LAYERS,
        "syncs_per_step": max(syncs, mask_syncs),
        "syncs_per_step_windowed": window_syncs,
        "kernels_outside_window": outside,
        "resident_adapter_parameters": resident_parameters(world),
    }


def resident_parameters(world: World) -> int:
    """Adapter parameters that the host keeps loaded, or that the sampled model can reach, seen
    from within a UNet call and after sampling."""
    found: list[int] = []
    model = world.apply(world.model)

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(_loaded(world.adapter.module) + _reachable(world.adapter.module, model))
        return executor(*args, **kwargs)

    wrappers = importlib.import_module("comfy.patcher_extension").WrappersMP
    model.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, "benchmark", look)
    sample(model, 1, SIZE)
    found.append(_loaded(world.adapter.module))
    return max(found)


def _loaded(module: torch.nn.Module) -> int:
    management = importlib.import_module("comfy.model_management")
    loaded = [x.model for x in management.current_loaded_models if x.model is not None]
    return sum(_size(module) for patcher in loaded if patcher.model is module)


def _reachable(module: torch.nn.Module, model: Any) -> int:
    ours = {id(p): p.numel() for p in module.parameters()}
    roots = (model.attachments, model.wrappers, model.model_options, model.additional_models)
    return sum(ours.get(id(x), 0) for x in _walk(*roots))


def _walk(*roots: Any) -> Iterator[Any]:
    seen: dict[int, Any] = {}
    stack = list(roots)
    while stack:
        item = stack.pop()
        if id(item) not in seen and not isinstance(item, (type, ModuleType, FunctionType)):
            seen[id(item)] = item
            stack += gc.get_referents(item)
    return iter(seen.values())


def _size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
