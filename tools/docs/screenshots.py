"""Take docs/graph.png, help.png and templates.png: the pack in ComfyUI's editor, on the miniature.

    python -m tools.docs.screenshots [--workflow text_and_image] [--text "a star"]

Needs `pip install playwright` and a Chromium (CHROMIUM_PATH, or `chromium` on the path).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from miniature import assemble
from miniature.workflows import in_editor
from tools.comfyui import browser, install
from tools.comfyui.server import Server

LOAD = """async (workflow) => {
    await app.loadGraphData(workflow)
    await app.queuePrompt(0)
}"""
DONE = """() => app.graph._nodes.some((node) => node.type === 'SaveImage' && node.imgs?.length)"""
NO_MINIMAP = """() => app.extensionManager.setting.set('Comfy.Minimap.Visible', false)"""
FIT = """() => {
    app.graph._nodes.filter((node) => node.type === 'MarkdownNote').forEach(
        (node) => app.graph.remove(node))
    app.extensionManager.command.execute('Comfy.Canvas.FitView')
}"""
SELECT = """(type) => {
    const node = app.graph._nodes.find((node) => node.type === type)
    app.canvas.ds.scale = 1
    app.canvas.centerOnNode(node)
    app.canvas.selectNode(node)
}"""
GRAPH: Any = {"x": 205, "y": 212, "width": 1292, "height": 378}  # where the fitted view lies


def draw(workflow: dict[str, Any], node: str, folder: Path) -> None:
    """Take the workflow after it has run, the page beside `node`, and the template browser."""

    def take(name: str, **options: Any) -> None:
        page.wait_for_timeout(3000)
        page.screenshot(path=folder / name, **options)
        print(folder / name)

    options = {"viewport": {"width": 1700, "height": 800}, "device_scale_factor": 1.5}
    server = Server(assemble.ensure(), install.require())
    with server as client, browser.editor(client, **options) as page:
        page.wait_for_timeout(3000)
        page.keyboard.press("Escape")
        page.evaluate(NO_MINIMAP)
        page.evaluate(LOAD, workflow)
        page.wait_for_function(DONE, timeout=600_000, polling=1000)
        page.evaluate(FIT)
        take("graph.png", clip=GRAPH)
        page.evaluate(SELECT, node)
        page.wait_for_timeout(1000)
        page.get_by_role("button", name="Node Info").click()
        take("help.png")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Templates").click()
        page.get_by_role("dialog").get_by_text("ip_adapter").first.click()
        take("templates.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workflow", default="text_and_image")
    parser.add_argument("--text", default="a star")
    parser.add_argument("--node", default="IPA_Apply", help="whose help page is shown")
    given = parser.parse_args()
    source = install.ROOT / "workflows" / f"{given.workflow}.json"
    workflow = in_editor(json.loads(source.read_text(encoding="utf-8")), given.text)
    draw(workflow, given.node, install.ROOT / "docs")


if __name__ == "__main__":
    main()
