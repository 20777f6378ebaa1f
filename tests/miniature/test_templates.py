"""Every workflow in the real editor, on the miniature: it opens, runs and shows its picture."""

from __future__ import annotations

import json

import pytest

from miniature.drawing import WORKFLOWS
from miniature.workflows import in_editor
from tools.comfyui.browser import COMPLAINTS

pytestmark = pytest.mark.browser
# SDXL is not of the miniature's family. A saved prompt has to be there before it can be loaded.
NAMES = sorted({path.stem for path in WORKFLOWS.glob("*.json")} - {"sdxl", "load_prompt"})

OPEN = """async (workflow) => {
    await app.loadGraphData(workflow)
    return app.graph._nodes.map((node) => ({
        type: node.type,
        known: node.type in LiteGraph.registered_node_types || node.type === 'MarkdownNote',
        failed: !!node.has_errors,
    }))
}"""
RAN = """() => {
    const saved = app.graph._nodes.filter((node) => node.type === 'SaveImage')
    return saved.length && saved.every((node) => node.imgs?.length && node.imgs[0].naturalWidth)
}"""
SHOWN = {  # words on a node after it ran
    "auto_load": {"IPA_AutoLoad": "'miniature.safetensors'"},
    "save_prompt": {"IPA_SavePrompt": "output/image_prompts/prompt_00001_.safetensors"},
}
SAYS = """(type) => app.graph._nodes.filter((node) => node.type === type).flatMap(
    (node) => node.widgets.map((widget) => String(widget.value))).join()"""


@pytest.fixture(scope="module")
def warnings(page):
    """What the editor writes into its console, of nodes, models and workflows."""
    for _ in range(3):  # it begins with the template browser
        page.keyboard.press("Escape")
    page.wait_for_function("() => !document.querySelector('[role=dialog]')")
    told = []
    page.on(
        "console",
        lambda message: told.append(message.text) if message.type in ("error", "warning") else None,
    )
    return told


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_runs_and_shows_its_picture(page, warnings, name):
    warnings.clear()
    workflow = json.loads((WORKFLOWS.parent / f"{name}.json").read_text("utf-8"))
    nodes = page.evaluate(OPEN, in_editor(workflow, "a star"))
    assert len(nodes) == len(workflow["nodes"])
    assert all(node["known"] and not node["failed"] for node in nodes), nodes
    page.evaluate("() => app.queuePrompt(0)")
    page.wait_for_function(f"() => ({RAN})() || ({COMPLAINTS})().length", timeout=120_000)
    assert page.evaluate(COMPLAINTS) == []
    assert page.evaluate(RAN)
    for node, words in SHOWN.get(name, {}).items():
        says = f"([type, words]) => ({SAYS})(type).includes(words)"
        page.wait_for_function(says, arg=[node, words], timeout=10_000)
    own = [text for text in warnings if "IPA_" in text or "missing" in text.lower()]
    assert not own, own
