"""Image prompts that a conditioning carries to the sampler, through whatever nodes lie between.

Nodes pass a conditioning on as (text states, options). Most keep the options, where
`AttachedPrompts` lies; those that calculate (Average, Concat) keep one conditioning's options and
calculate with the states of all. So the states know the prompts too, and these follow the
arithmetic: an image's part is linear in V', so that a factor of the states is one of λ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import comfy.conds
import torch
from torch import Tensor

from .layers import KEY
from .prompt_rows import CompiledPrompt

logger = logging.getLogger("comfyui_ip_adapter")
Conditioning: TypeAlias = list[list[Any]]
# Operations on states, by name without underscores: those that keep all of them, those that lay
# some side by side, and the factors of those that add two.
_SAME = {
    *("to", "cpu", "cuda", "float", "half", "bfloat16", "double", "type", "type_as", "clone"),
    *("detach", "contiguous", "repeat", "expand", "expand_as", "reshape", "view"),
    *("getitem", "narrow", "unsqueeze", "squeeze", "pad", "flatten", "repeat_interleave"),
    *("index_select", "chunk", "split", "movedim", "transpose", "permute", "zeros_like"),
}
_SIDE_BY_SIDE = {"cat", "concat", "concatenate", "stack"}
_SUMS = {
    **dict.fromkeys(("add", "radd", "iadd"), (1.0, 1.0)),
    **dict.fromkeys(("sub", "isub", "subtract"), (1.0, -1.0)),
    "rsub": (-1.0, 1.0),
}
_PRODUCTS = {"mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "divide"}


@dataclass(eq=False)
class Attached:
    """A prompt on a conditioning, its weight there, and what a zeroed-out one carries instead."""

    prompt: CompiledPrompt
    zeroed: CompiledPrompt | None
    told: bool = False

    def ignored(self) -> None:
        """Tell, once, that something reads the text beside the prompt and leaves the prompt out."""
        if not self.told:
            self.told = True
            logger.warning(
                "The text of a conditioning that carries an image prompt is used without the "
                "prompt: a node between (regions of another pack, say) takes the text alone. That "
                "image has no effect there. Give it a mask of its own in 'Apply IP-Adapter', or "
                "use 'Apply IP-Adapter (Regions)'."
            )


Weights: TypeAlias = Mapping[Attached, float]


class AttachedPrompts(comfy.conds.CONDRegular):
    """Prompts of a conditioning before sampling; `cond` is a tuple of `Attached`."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> AttachedPrompts:
        raise RuntimeError(
            "This conditioning carries an image prompt, but the sampled model does not know of "
            "it. Connect the MODEL output of 'Apply IP-Adapter (Conditioning)' to the sampler; if "
            "it is, give nodes that evaluate texts of their own (Perp-Neg) one without a prompt."
        )


class PromptedStates(Tensor):
    """Text states that know the image prompts beside them, and how much each counts."""

    prompts: Weights

    @staticmethod
    def of(states: Tensor, prompts: Weights) -> Tensor:
        """Return the states with these prompts, which share their memory."""
        plain = states.as_subclass(Tensor)
        if not prompts:
            return plain
        made: PromptedStates = plain.as_subclass(PromptedStates)
        made.prompts = prompts
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calculate with the states, and with the prompts where that is defined."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        given = [*given[0], *given[1:]] if given and isinstance(given[0], list | tuple) else given
        name = getattr(func, "__name__", "").strip("_")
        if isinstance(result, tuple | list) and name in _SAME:
            return type(result)(_followed(name, one, given) for one in result)
        return _followed(name, result, given) if isinstance(result, Tensor) else result

    def __deepcopy__(self, memo: Any) -> Tensor:
        return PromptedStates.of(self.as_subclass(Tensor).clone(), self.prompts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _followed(name: str, result: Tensor, given: Sequence[Any]) -> Tensor:
    """Return an operation's result with the prompts that its arguments bring along."""
    known = [x for x in given if isinstance(x, PromptedStates)]
    weights = _weights(name, given)
    if weights is None:  # not defined: told where it gives states, or something reads them
        if name == "linear" or any(result.shape == x.shape for x in known):
            for attached in {attached for x in known for attached in x.prompts}:
                attached.ignored()
        return result.as_subclass(Tensor)
    if known and result is known[0]:  # in place
        known[0].prompts = weights
        return result
    return PromptedStates.of(result, weights)


def _weights(name: str, given: Sequence[Any]) -> Weights | None:
    if name in _SAME:
        return given[0].prompts if isinstance(given[0], PromptedStates) else {}
    if name in _SIDE_BY_SIDE:
        several = [x.prompts for x in given if isinstance(x, PromptedStates)]
        return {p: max(x.get(p, 0.0) for x in several) for x in several for p in x}
    factors: Sequence[float | None]
    if name in _PRODUCTS:
        numbers = [_number(x) for x in given[:2]]
        factors = [1 / x if "div" in name and x else x for x in reversed(numbers)]
    elif name == "lerp":
        share = _number(given[2])
        factors = (None, None) if share is None else (1 - share, share)
    else:
        factors = (-1.0,) if name == "neg" else _SUMS.get(name, ())
    total: dict[Attached, float] = {}
    for states, factor in zip(given, factors, strict=False):
        if isinstance(states, PromptedStates):
            if factor is None:
                return None
            for attached, weight in states.prompts.items():
                total[attached] = total.get(attached, 0.0) + factor * weight
    return total if factors else None


def _number(value: Any) -> float | None:
    if isinstance(value, PromptedStates):
        return None
    single = isinstance(value, Tensor) and value.numel() == 1
    return float(value) if single or isinstance(value, int | float) else None


def attached_to(states: Tensor | None, options: Mapping[str, Any]) -> Weights:
    """Return the prompts that a conditioning carries, with their weights.

    The states' are right where both know some: other nodes may have calculated since.
    """
    if isinstance(states, PromptedStates):
        return states.prompts
    carried = options.get("model_conds", {}).get(KEY)
    return dict.fromkeys(carried.cond, 1.0) if isinstance(carried, AttachedPrompts) else {}


def compiled(states: Tensor | None, options: Mapping[str, Any]) -> Iterable[CompiledPrompt]:
    """Yield the prompts of a conditioning as they are to be sampled.

    States that are all zeros, the usual way to do without a negative text, carry what stands
    against the image in place of the image.
    """
    zeroed = states is not None and not states.any()
    for attached, weight in attached_to(states, options).items():
        if zeroed:
            if attached.zeroed is not None:
                yield attached.zeroed
        elif weight:
            yield attached.prompt.scaled(weight)


def apply_to_conditioning(
    conditioning: Conditioning, prompt: CompiledPrompt | None, zeroed: CompiledPrompt | None
) -> Conditioning:
    """Return a copy whose entries carry the prompt, if any, besides those that they carry already.

    `zeroed`: what one carries whose states are zeros, if anything.
    """
    if prompt is None:
        return conditioning
    new = Attached(prompt, zeroed)

    def attach(states: Tensor | None, options: Mapping[str, Any]) -> list[Any]:
        carried = {**attached_to(states, options), new: 1.0}
        conds = {**options.get("model_conds", {}), KEY: AttachedPrompts((*carried,))}
        states = None if states is None else PromptedStates.of(states, carried)
        return [states, {**options, "model_conds": conds}]

    return [attach(states, options) for states, options in conditioning]
