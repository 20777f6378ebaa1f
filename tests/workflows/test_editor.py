"""The workflows in the host's own editor, in a headless browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tools.server import Client

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The spinner turns until the editor has loaded a graph of its own accord, which would replace ours.
READY = """() => window.app?.extensionManager?.workflow?.activeWorkflow
    && app.extensionManager.spinner === false
    && window.LiteGraph?.registered_node_types?.IPA_Apply"""
LOAD = """async (workflow) => {
    await app.loadGraphData(workflow)
    const nodes = app.graph._nodes.map(
        (node) => ({type: node.type, size: [...node.size], least: [...node.computeSize()]}))
    return {api: (await app.graphToPrompt()).output, nodes}
}"""


@pytest.fixture(scope="module")
def load(client: Client) -> Iterator[Callable[[Any], dict[str, Any]]]:
    """Loads a workflow into the editor, on a page cut off from everything but the server."""
    url = f"http://{client.address}"
    browser = os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, BROWSERS)), "")
    if not browser:
        pytest.skip("no browser: install chromium, or name one in CHROMIUM_PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="`pip install playwright`")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
        page = chromium.new_page(viewport={"width": 1600, "height": 900})
        page.route(
            lambda asked: not asked.startswith((url, "data:", "blob:")),
            lambda route: route.abort(),
        )
        page.goto(url)
        page.wait_for_function(READY, timeout=120_000)
        loaded: dict[str, Any] = {}
        yield (
            lambda workflow: (
                loaded.get(workflow.name)
                or loaded.setdefault(workflow.name, page.evaluate(LOAD, workflow.editor))
            )
        )
        chromium.close()


def test_the_editor_sends_what_lies_in_api(load, workflow):
    assert load(workflow)["api"] == workflow.api


def test_no_node_is_smaller_than_its_contents(load, workflow):
    for node in load(workflow)["nodes"]:
        assert node["size"][0] >= node["least"][0] and node["size"][1] >= node["least"][1], node
