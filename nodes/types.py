"""The pack's own sockets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

IPAdapter = io.Custom("IP_ADAPTER")
ImagePrompt = io.Custom("IMAGE_PROMPT")
LayerWeights = io.Custom("LAYER_WEIGHTS")
LatentWeights = io.Custom("LATENT_WEIGHTS")
AttentionRecord = io.Custom("ATTENTION_RECORD")


def in_order(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A growing list by the numbers of its sockets: a request may hold them in any order."""
    return {name: entries[name] for name in sorted(entries, key=_number)}


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))
