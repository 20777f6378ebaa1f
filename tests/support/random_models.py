"""Random weights that behave: finite, well scaled, never zero where a result depends on them.

Every tensor is drawn from its own generator, seeded by its name, so that it depends on its name,
shape and seed alone. Convolutions of 3×3 are low-pass: noise would make images of noise.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Layout = Mapping[str, tuple[int, ...]]
State = dict[str, Tensor]
_BLUR = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
_EMBEDDING = re.compile(r"(?<!patch_)embedding(\.weight)?$|latents$")


def draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return standard normal numbers, the same for the same name, shape and seed; float32."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.randn(shape, generator=generator)


def _values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if not shape:
        return torch.tensor(math.log(100.0))  # CLIP's logit_scale
    noise = draw(name, shape, seed)
    if _EMBEDDING.search(name):
        return noise * (0.3 if "position" in name else 1.0)
    if len(shape) == 1:
        return noise * 0.03 + (1.0 if name.endswith("weight") else 0.0)
    if len(shape) == 4 and shape[2] == 3:
        return draw(name, (*shape[:2], 1, 1), seed) / math.sqrt(shape[1]) * _BLUR
    return noise / math.sqrt(math.prod(shape[1:]))


def weights(
    layout: Layout,
    seed: int = 0,
    gains: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> State:
    """Make weights that keep activations near 1: fan-in scaling, normalisations around 1.

    `gains`: factors of the tensors whose names end so.
    """
    state = {}
    for name, shape in layout.items():
        values = _values(name, shape, seed)
        for ending, gain in (gains or {}).items():
            if name.endswith(ending):
                values *= gain
        state[name] = values.to(dtype).contiguous()
    return state


def fill(module: Any, seed: int) -> Any:
    """Give a module such `weights`, each in its parameter's dtype, and return it frozen.

    On the meta device there is nothing to fill.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            parameter.data = _values(name, tuple(parameter.shape), seed).to(parameter.dtype)
    return module.eval().requires_grad_(False)


def under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same tensors or shapes with `prefix` before every name."""
    return {prefix + name: value for name, value in state.items()}


def sections(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return an adapter's tensors as the official .bin files hold them."""
    found: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in state.items():
        section, _, name = key.partition(".")
        found[section][name] = value
    return found
