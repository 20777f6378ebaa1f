"""Write the nodes' English texts as ComfyUI's translations have them: locales/en/nodeDefs.json.

    python -m tools.docs.locales [--check]

The other languages in `locales/` have the same keys; tests/workflows tells what one lacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tools.comfyui.install import ROOT
from tools.generated import Files, ObjectInfo, command, inputs_of, ours

LOCALES = ROOT / "locales"


def build(info: ObjectInfo) -> Files:
    """Return what people read of each of the pack's nodes, by the keys of the editor's nodeDefs."""
    texts = {name: _node(node) for name, node in ours(info).items()}
    text = json.dumps(texts, indent=2, ensure_ascii=False) + "\n"
    return {LOCALES / "en" / "nodeDefs.json": text.encode()}


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {
            name: _named(name, options.get("tooltip")) for name, _, options, _ in inputs_of(node)
        },
        "outputs": {str(place): _named(*output) for place, output in enumerate(outputs)},
    }


def _named(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


if __name__ == "__main__":
    command(__doc__, build)
