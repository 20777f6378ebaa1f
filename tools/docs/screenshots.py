"""Take docs/graph.png, help.png and templates.png: the pack in ComfyUI's editor, on the miniature.

    python -m tools.docs.screenshots [--workflow text_and_image] [--text "a star"]

Needs `pip install playwright` and a Chromium (CHROMIUM_PATH, or `chromium` on the path).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from miniature import setup
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


def graph(page: Any, workflow: dict[str, Any], target: Path) -> None:
    """Take the workflow after it has run."""
    page.evaluate(LOAD, workflow)
    page.wait_for_function(DONE, timeout=600_000, polling=1000)
    page.evaluate(FIT)
    page.wait_for_timeout(3000)
    page.screenshot(path=target, clip=GRAPH)


def help_panel(page: Any, node: str, target: Path) -> None:
    """Take a node of the loaded workflow, and its page beside it."""
    page.evaluate(SELECT, node)
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Node Info").click()
    page.wait_for_timeout(3000)
    page.screenshot(path=target)


def templates(page: Any, target: Path) -> None:
    """Take the template browser with the pack's workflows."""
    page.get_by_role("button", name="Templates").click()
    page.get_by_role("dialog").get_by_text("ip_adapter").first.click()
    page.wait_for_timeout(3000)
    page.screenshot(path=target)


def draw(workflow: dict[str, Any], node: str, folder: Path) -> list[Path]:
    """Take all of them, and return their files."""
    folder.mkdir(exist_ok=True)
    targets = [folder / f"{name}.png" for name in ("graph", "help", "templates")]
    options = {"viewport": {"width": 1700, "height": 800}, "device_scale_factor": 1.5}
    server = Server(setup.ensure(), install.require())
    with server as client, browser.editor(client, **options) as page:
        page.wait_for_timeout(3000)
        page.keyboard.press("Escape")
        page.evaluate(NO_MINIMAP)
        graph(page, workflow, targets[0])
        help_panel(page, node, targets[1])
        page.keyboard.press("Escape")
        templates(page, targets[2])
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workflow", default="text_and_image")
    parser.add_argument("--text", default="a star")
    parser.add_argument("--node", default="IPA_Apply", help="whose help page is shown")
    given = parser.parse_args()
    source = install.ROOT / "workflows" / f"{given.workflow}.json"
    workflow = in_editor(json.loads(source.read_text(encoding="utf-8")), given.text)
    for target in draw(workflow, given.node, install.ROOT / "docs"):
        print(target)


if __name__ == "__main__":
    main()
