"""What an image prompt adds to sampling, counted in dispatched operations.

A kernel is an operation that computes or copies; views cost nothing on the device and are left
out. Counts are differences: with the prompt minus without, N + 1 steps minus N.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from .full_size import Setup, thirds

SIDE = 16  # of the latents; counts do not depend on it
SYNC = "_local_scalar_dense"  # .item(), float(), bool(): the host waits for the device
VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze"),
    *("slice", "select", "detach", "alias", "reshape", "split", "split_with_sizes", "chunk"),
    *("_reshape_alias", "unbind", "as_strided", "unsafe_split", "unflatten", "narrow"),
}


class Trace(TorchDispatchMode):
    """Count every operation that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket._qualified_op_name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def per_step(setup: Setup, model: Any) -> Counter[str]:
    """Count the operations of one sampling step, without what a run costs once."""
    counts, small = [], replace(setup, side=min(SIDE, setup.side))
    small.sample(model)  # it is loaded, and a LoRA is added to its weights
    for steps in (2, 3):
        with Trace() as trace:
            small.sample(model, steps)
        counts.append(trace.calls)
    return Counter({k: n - counts[0][k] for k, n in counts[1].items()})


def added(setup: Setup, *models: Any) -> list[tuple[int, int]]:
    """Count (kernels, synchronisations) that the prompt of each model adds to a step."""
    without, found = per_step(setup, setup.model), []
    for model in models:
        with_prompt = per_step(setup, model)
        names = with_prompt.keys() | without.keys()
        difference = {name: with_prompt[name] - without[name] for name in names}
        syncs = difference.pop(SYNC, 0)
        found.append((sum(n for name, n in difference.items() if name not in VIEWS), syncs))
    return found


def measure(setup: Setup) -> dict[str, float]:
    """Count what a prompt adds: in all, with a mask, a curve of ten pieces, a window, a face."""
    settings: list[dict[str, Any]] = [
        {},
        {"mask": thirds()[0]},
        {"weight_curve": [[i / 10, (i % 3) / 2] for i in range(11)]},
        {"start_at": 1.0, "end_at": 1.0},
    ]
    models = [setup.apply(setup.model, **given) for given in settings]
    *within, (outside, window_syncs) = added(setup, *models)
    within += added(setup, setup.of_faces().apply(setup.model))
    one, mask, curve, face = (kernels / len(setup.size.widths) for kernels, _ in within)
    return {
        "kernels_per_layer": one,
        "kernels_per_layer_mask": mask,
        "kernels_per_layer_curve": curve,
        "kernels_per_layer_face": face,
        "syncs_per_step": max(syncs for _, syncs in within),
        "syncs_per_step_windowed": window_syncs,
        "kernels_outside_window": outside,
        "resident_adapter_parameters": resident_parameters(setup),
    }


def resident_parameters(setup: Setup) -> int:
    """Count adapter parameters that the sampled model, or one that the host keeps, can reach.

    Seen from within a UNet call and after sampling.
    """
    from comfy import model_management
    from comfy.patcher_extension import WrappersMP

    sizes = {id(p): p.numel() for p in setup.adapter.module.parameters()}
    model = setup.apply(setup.model)
    found: list[int] = []

    def count() -> None:
        loaded = [entry.model for entry in model_management.current_loaded_models]
        found.append(sum(sizes.get(id(thing), 0) for thing in reachable(model, *loaded)))

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:  # holds nothing of the adapter
        count()
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "benchmark", look)
    replace(setup, side=min(SIDE, setup.side)).sample(model)
    count()
    return max(found)


def reachable(*roots: Any) -> Iterable[Any]:
    """Return everything that these objects hold, as the garbage collector sees it.

    Not through modules, classes and functions' globals: by way of those, everything reaches
    everything.
    """
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
