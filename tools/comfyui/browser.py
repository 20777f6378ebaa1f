"""ComfyUI's editor in a headless Chromium, for tests and pictures (`pip install playwright`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tools.comfyui.client import Client

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
# The spinner turns until the editor has loaded a graph of its own accord, which would replace ours.
_READY = """() => window.app?.extensionManager?.workflow?.activeWorkflow
    && app.extensionManager.spinner === false
    && window.LiteGraph?.registered_node_types?.IPA_Apply"""
COMPLAINTS = """() => [...document.querySelectorAll(`
    [role=dialog], [data-testid=error-overlay], .p-toast-message-error, .p-toast-message-warn`
)].map((found) => found.innerText)"""
"""What the editor says against a workflow, or a run of it: dialogs, warnings and errors."""


def chromium() -> str | None:
    """Return the browser that CHROMIUM_PATH names, or that is on the path."""
    return os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def editor(client: Client, **options: Any) -> Iterator[Any]:
    """Open a page with the editor, cut off from everything but the server.

    While it is there, its thread has a running event loop, and no `Client` can run a prompt.
    `options` are the page's.
    """
    from playwright.sync_api import sync_playwright

    url = f"http://{client.address}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=[*ARGUMENTS])
        page = browser.new_page(**options)
        page.route(
            lambda asked: not asked.startswith((url, "data:", "blob:")),
            lambda route: route.abort(),
        )
        page.goto(url)
        page.wait_for_function(_READY, timeout=180_000)
        yield page
        browser.close()
