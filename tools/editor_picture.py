"""Draw docs/graph.png: a workflow in ComfyUI's editor, after it has run on the stand-in models.

    python -m tools.editor_picture [--workflow text_and_image] [--steps 10]

Needs `pip install playwright` and a Chromium (CHROMIUM_PATH, or `chromium` on the path).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tools import host, miniature
from tools.server import Server

READY = """() => window.app?.extensionManager && window.app.graph
    && window.LiteGraph?.registered_node_types?.IPA_Apply"""
LOAD = """async (workflow) => {
    await app.loadGraphData(workflow)
    await app.queuePrompt(0)
}"""
DONE = """() => app.graph._nodes.some((node) => node.type === 'SaveImage' && node.imgs?.length)"""
FIT = """() => {
    app.graph._nodes.filter((node) => node.type === 'MarkdownNote').forEach(
        (node) => app.graph.remove(node))
    app.extensionManager.command.execute('Comfy.Canvas.FitView')
}"""
GRAPH: Any = {"x": 205, "y": 212, "width": 1292, "height": 378}  # where the fitted view lies


def prepared(name: str, steps: int) -> dict[str, Any]:
    """The editor's workflow, with fewer steps and a smaller picture."""
    workflow = json.loads((host.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        values = node.get("widgets_values")
        if node["type"] == "KSampler":
            values[2] = steps
        elif node["type"] == "EmptyLatentImage":
            values[:2] = [256, 256]
    return workflow


def draw(workflow: dict[str, Any], target: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium")
    with Server(miniature.ensure("sd15"), host.require()) as client, sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1700, "height": 800}, device_scale_factor=1.5)
        page.goto(f"http://{client.address}")
        page.wait_for_function(READY, timeout=180_000)
        page.wait_for_timeout(3000)
        page.keyboard.press("Escape")
        page.evaluate(LOAD, workflow)
        page.wait_for_function(DONE, timeout=600_000, polling=1000)
        page.evaluate(FIT)
        page.wait_for_timeout(3000)
        target.parent.mkdir(exist_ok=True)
        page.screenshot(path=target, clip=GRAPH)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workflow", default="text_and_image")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    target = host.ROOT / "docs" / "graph.png"
    draw(prepared(given.workflow, given.steps), target)
    print(target)


if __name__ == "__main__":
    main()
