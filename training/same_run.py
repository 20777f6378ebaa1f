"""Whether a run that goes on is the one that began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .config import Settings
from .errors import TrainingError


def check_same(stored: Mapping[str, Any], settings: Settings, identity: Mapping[str, Any]) -> None:
    """Raise TrainingError if the stored run was another: going on would be neither."""
    now = json.loads(json.dumps({**settings.deciding(), **identity}))  # as it would be read back
    # Of a setting that was not there yet when the run began, today's default is what it did.
    begun = {f.name: f.default for f in fields(settings) if f.default is not MISSING}
    before = {**begun, **stored["settings"], **stored["identity"]}
    other = [name for name, value in now.items() if before.get(name) != value]
    if other:
        told = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in other)
        raise TrainingError(
            f"'{settings.out}' holds a run of other settings, at step {stored['step']}: {told}. "
            "Give the same ones to go on with it. To train on with these, start from its "
            f"adapter: --adapter {Path(settings.out, 'ip-adapter.safetensors')} and another --out."
        )
