"""Whether ids are served, and whether pictures are to be as ComfyUI_IPAdapter_plus made them.

An environment variable goes before ComfyUI's settings, where a switch stands for either.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import folder_paths

logger = logging.getLogger("comfyui_ip_adapter")
SERVE = "IP_ADAPTER_SERVE_PLUS_IDS", "IPAdapter.ServeIds"
LIKE_THE_OLD = "IP_ADAPTER_LIKE_PLUS", "IPAdapter.LikeTheOldPack"


def serves_ids() -> bool:
    """Return whether the ids of ComfyUI_IPAdapter_plus are served where nobody else has them."""
    return _is_on(*SERVE, default=True)


def like_the_old() -> bool:
    """Return whether served nodes compute as ComfyUI_IPAdapter_plus did, where it was wrong too."""
    return _is_on(*LIKE_THE_OLD, default=False)


def _is_on(variable: str, key: str, default: bool) -> bool:
    given = os.environ.get(variable, "").strip().lower()
    if given:
        return given not in ("0", "false", "no", "off")
    path = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        found = json.loads(path.read_text("utf-8")).get(key, default)
    except FileNotFoundError:
        return default
    except (OSError, ValueError, AttributeError) as error:
        logger.warning("ComfyUI's settings cannot be read (%s): %s is %s.", error, key, default)
        return default
    return bool(found)
