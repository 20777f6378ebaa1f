"""Write the nodes' English texts as ComfyUI's translations have them: locales/en/nodeDefs.json.

    python -m tools.build_texts

The other languages in `locales/` have the same keys; tests/workflows tells what one lacks.
"""

from __future__ import annotations

import json
from typing import Any

from tests.support import standins
from tools.comfyui import install as host
from tools.comfyui.install import ROOT
from tools.comfyui.server import Server
from tools.workflows.graph import ObjectInfo

LOCALES = ROOT / "locales"
PREFIX = "IPA_"


def texts(info: ObjectInfo) -> dict[str, Any]:
    """What people read of each of the pack's nodes, by the keys of the editor's nodeDefs."""
    return {name: _node(node) for name, node in sorted(info.items()) if name.startswith(PREFIX)}


def _node(node: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for kind in ("required", "optional"):
        for name, (_, *rest) in node["input"].get(kind, {}).items():
            tooltip = rest[0].get("tooltip") if rest else None
            inputs[name] = _named(name, tooltip)
    pairs = zip(node["output_name"], node["output_tooltips"], strict=True)
    outputs = {str(place): _named(*pair) for place, pair in enumerate(pairs)}
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def _named(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def dump(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    with Server(standins.ensure(), host.require()) as client:
        info = client.object_info()
    target = LOCALES / "en" / "nodeDefs.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(dump(texts(info)), encoding="utf-8")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
