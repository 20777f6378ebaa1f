"""Packages of drawings as npm has those of Iconify, with simple drawings of every hand."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from training.recipes.emoji import drawings

SUBJECTS = [f"thing-{number:02}" for number in range(30)]


def body(subject: str, hand: str) -> str:
    """Return another shape for every subject, another colour for every hand."""
    number = SUBJECTS.index(subject)
    hue = 30 + 25 * [h.package for h in drawings.HANDS].index(hand)
    x, y = number % 6, number // 6
    return f'<path fill="rgb({hue},{255 - hue},{hue})" d="M{x * 4} {y * 5}h12v9h-12z"/>'


def packages_of_drawings(folder: Path) -> Path:
    """Write the archive of every hand into `folder`, with aliases, skins and look-alikes."""
    folder.mkdir(parents=True, exist_ok=True)
    for hand in drawings.HANDS:
        names = SUBJECTS[:: 3 if hand.package == drawings.HELD_OUT_HAND else 1]
        icons = {name: {"body": body(name, hand.package)} for name in names}
        if hand.package == drawings.HELD_OUT_HAND:
            icons = {name.replace("-", ""): icon for name, icon in icons.items()}
        else:
            icons["again"] = icons["thing-07"]  # looks like another
            icons["wide"] = {"body": '<path fill="red" d="M0 0h64v16h-64z"/>', "width": 64}
            icons["wide"]["height"] = 16
            icons["person-medium-dark"] = {"body": body("thing-00", hand.package)}
        data = {"icons": icons, "width": 32, "height": 32}
        data["aliases"] = {"called-otherwise": {"parent": next(iter(icons))}}
        archive = folder / f"iconify-json-{hand.package}-{hand.version}.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            content = json.dumps(data).encode()
            info = tarfile.TarInfo("package/icons.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder
