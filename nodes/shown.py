"""Words that the editor shows on a node."""

from __future__ import annotations

from comfy_api.latest import io


def show(node: type[io.ComfyNode], text: str) -> None:
    """Show `text` on the node that runs, of a class with `io.Hidden.unique_id`; without a server
    nothing happens."""
    number = node.hidden.unique_id if node.hidden is not None else None
    if number is None:
        return
    from server import PromptServer  # the host's

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, number)
