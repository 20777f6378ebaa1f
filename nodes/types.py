"""The pack's own sockets, growing lists, and words on a node."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from comfy_api.latest import io

logger = logging.getLogger("comfyui_ip_adapter")
IPAdapter = io.Custom("IP_ADAPTER")
ImagePrompt = io.Custom("IMAGE_PROMPT")
LayerWeights = io.Custom("LAYER_WEIGHTS")
LatentWeights = io.Custom("LATENT_WEIGHTS")
AttentionRecord = io.Custom("ATTENTION_RECORD")
FaceEncoder = io.Custom("FACE_ENCODER")

PATCHED = "The model to patch. The original is not changed: use the output."
"""Tooltip of the model that a node takes and changes a copy of."""


class Node(io.ComfyNode):
    """A node that leaves out what a client links besides its inputs, as ComfyUI does constants."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("execute", "fingerprint_inputs"):
            method = getattr(vars(cls).get(name), "__func__", None)
            # ComfyUI clones classes, which then take no attribute: what is wrapped stays.
            if method is not None and not hasattr(method, "__wrapped__") and not _takes_all(method):
                setattr(cls, name, classmethod(_without_surplus(method)))


def _takes_all(method: Callable[..., Any]) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _without_surplus(method: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(method).parameters.values()
    known = {parameter.name for parameter in parameters}

    @functools.wraps(method)
    def call(cls: Any, *args: Any, **given: Any) -> Any:
        surplus = given.keys() - known
        if surplus:
            names = ", ".join(sorted(surplus))
            logger.warning("%s has no input %s: left out.", cls.__name__, names)
        return method(cls, *args, **{name: given[name] for name in given.keys() & known})

    return call


def output(kind: Any, name: str, tooltip: str) -> io.Output:
    """Return an output that is called as its id, on older hosts too."""
    return kind.Output(name, display_name=name, tooltip=tooltip)


def fraction(name: str, default: float, tooltip: str, step: float = 0.001) -> io.Input:
    """Return an input from 0 to 1; in the usual steps, of the schedule."""
    given = {"default": default, "min": 0.0, "max": 1.0, "step": step}
    return io.Float.Input(name, **given, tooltip=tooltip)


def in_order(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Sort a growing list by the numbers of its sockets: a request may hold them in any order."""
    return {name: entries[name] for name in sorted(entries, key=_number)}


def by_number(entries: Mapping[str, Any]) -> dict[int, Any]:
    """Return a growing list's values by the numbers of their sockets, in order.

    Those that nothing comes in at are left out.
    """
    ordered = in_order(entries).items()
    return {_number(name): value for name, value in ordered if value is not None}


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def show(node: type[Node], text: str) -> None:
    """Show `text` on the node that runs, of a class with `io.Hidden.unique_id`.

    Without a server nothing happens.
    """
    number = node.hidden.unique_id if node.hidden is not None else None
    if number is None:
        return
    from server import PromptServer  # ComfyUI's

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, number)
