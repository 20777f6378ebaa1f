"""Write the example workflows from their descriptions.

    python -m tools.build_workflows

A ComfyUI with this pack tells which sockets and widgets its nodes have: one that runs, if
`--server` names its address, else one started for it. The editor's files go to `workflows/`,
those for headless runs to `workflows/api/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.support import standins
from tools.comfyui import install as host
from tools.comfyui.server import Client, Server
from tools.workflows.editor import dump, to_editor
from tools.workflows.graph import ObjectInfo, to_api
from tools.workflows.tasks import TASKS

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"


def build(info: ObjectInfo) -> dict[str, str]:
    """Every file's text by its path below `workflows/`."""
    files: dict[str, str] = {}
    for describe in TASKS:
        graph = describe()
        files[f"{graph.name}.json"] = dump(to_editor(graph, info))
        files[f"api/{graph.name}.json"] = dump(to_api(graph, info))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", help="a running ComfyUI, such as 127.0.0.1:8188")
    address = parser.parse_args().server
    if address:
        info = Client(address).object_info()
    else:
        with Server(standins.ensure(), host.require()) as client:
            info = client.object_info()
    for path, text in build(info).items():
        file = WORKFLOWS / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(WORKFLOWS.parent))


if __name__ == "__main__":
    main()
