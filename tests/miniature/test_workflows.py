"""The shipped workflows on the miniature: the same graphs, by API and in the editor."""

from __future__ import annotations

import json

import pytest

from miniature import workflows
from miniature.through_comfyui import WORKFLOWS
from tools.comfyui.browser import COMPLAINTS
from tools.workflows import api

NAMES = [name for name in api.NAMES if workflows.runs(api.read(name))]


@pytest.mark.parametrize("name", ["text_and_image", "per_prompt", "several_images_masks"])
def test_workflows_keep_their_graph_on_the_miniature(workflow, name):
    before = workflow(name)
    after = workflows.on_miniature(before, "a star")
    assert before == workflow(name)
    assert after.keys() == before.keys()
    texts = [n["inputs"]["text"] for n in after.values() if n["class_type"] == "CLIPTextEncode"]
    assert set(texts) <= {"", "a star"}
    for key, node in after.items():
        links = {k: v for k, v in node["inputs"].items() if isinstance(v, list)}
        assert links == {k: v for k, v in before[key]["inputs"].items() if isinstance(v, list)}
    named = json.dumps(after)
    assert "v1-5" not in named and "CLIP-ViT" not in named and "_sd15" not in named


def test_the_editors_workflow_says_on_the_miniature_what_the_api_does(workflow):
    """Node by node: the same classes, and every value of the API's among the editor's widgets."""
    for name in NAMES:
        editor = json.loads((WORKFLOWS.parent / f"{name}.json").read_text("utf-8"))
        shown = {str(node["id"]): node for node in workflows.in_editor(editor, "a star")["nodes"]}
        for key, node in workflows.on_miniature(workflow(name), "a star").items():
            assert shown[key]["type"] == node["class_type"], name
            for value in node["inputs"].values():
                widgets = shown[key].get("widgets_values", ())
                assert isinstance(value, list) or value in widgets, (name, key, value)


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


@pytest.mark.browser
@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in NAMES if name != "load_prompt"])
def test_it_opens_runs_and_shows_its_image_in_the_editor(page, warnings, name):
    """A saved prompt has to be there before it can be loaded."""
    warnings.clear()
    workflow = json.loads((WORKFLOWS.parent / f"{name}.json").read_text("utf-8"))
    nodes = page.evaluate(OPEN, workflows.in_editor(workflow, "a star"))
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
