"""What ComfyUI's server does for the served ids: it completes requests, and rewrites workflows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...ip_adapter_core.ipadapter_plus.convert import convert
from .requests import completed

_ROUTE = "/ip_adapter/convert"
_known: set[int] = set()


def add_to_server(served: Callable[[], Mapping[str, type]]) -> None:
    """Add both to the running server, once; without one nothing happens.

    Args:
        served: Returns the classes of the ids that are served at the moment.
    """
    from server import PromptServer  # ComfyUI's

    server = getattr(PromptServer, "instance", None)
    if server is None or id(server) in _known:
        return
    _known.add(id(server))
    server.add_on_prompt_handler(lambda request: completed(request, served()))
    server.routes.post(_ROUTE)(_convert)


async def _convert(request: Any) -> Any:
    from aiohttp import web

    try:
        made = convert(await request.json())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return web.json_response({"error": str(error) or type(error).__name__}, status=400)
    return web.json_response({"workflow": made.workflow, "report": made.report})
