"""Write the pages of ComfyUI's help panel, one a node: web/docs/<id>.md, and their pictures.

    python -m tools.build_help

`tools/help/<id>.md` is the prose. The line `{inputs}` in it becomes the table that the node's
schema gives, so that no page goes stale; `{outputs}` the same, with the meanings that stand in the
lines behind it as `name: meaning`; `{picture regions}` the picture of the workflow of that name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support import standins
from tools.build_texts import PREFIX
from tools.build_workflows import WORKFLOWS
from tools.comfyui import install as host
from tools.comfyui.install import ROOT
from tools.comfyui.server import Server
from tools.workflows.graph import ObjectInfo

PROSE = ROOT / "tools" / "help"
DOCS = ROOT / "web" / "docs"
PICTURES = "pictures"  # beside the pages, whose links are relative to their own folder

_INPUTS = re.compile(r"^\{inputs\}$", re.M)
_OUTPUTS = re.compile(r"^\{outputs\}\n((?:\w+: .+\n?)*)", re.M)
_PICTURE = re.compile(r"^\{picture (\w+)\}$", re.M)
_CHOICE = re.compile(r"(?:^|(?<=\. ))([^.:,]+):")  # a sentence on one, in a tooltip
_MARKS = re.compile(r"([\\`*|<\[]|\b_|_\b)")  # that markdown would take for its own


def build(info: ObjectInfo) -> dict[str, str]:
    """Every page's text by its name below `web/docs/`."""
    ids = sorted(name for name in info if name.startswith(PREFIX))
    return {f"{name}.md": _page(info[name], _prose(name)) for name in ids}


def pictures() -> list[Path]:
    """The workflows' pictures that the pages show."""
    texts = (file.read_text(encoding="utf-8") for file in PROSE.glob("*.md"))
    names = {name for text in texts for name in _PICTURE.findall(text)}
    return [WORKFLOWS / f"{name}.jpg" for name in sorted(names)]


def _prose(name: str) -> str:
    return (PROSE / f"{name}.md").read_text(encoding="utf-8")


def _page(node: dict[str, Any], prose: str) -> str:
    """Raises ValueError where the prose lacks a table, or does not say what an output is."""
    name = node["name"]
    outputs = _OUTPUTS.search(prose)
    if outputs is None or not _INPUTS.search(prose):
        raise ValueError(f"tools/help/{name}.md lacks the line {{inputs}} or {{outputs}}.")
    text = f"# {node['display_name']}\n\n{prose}"
    text = text.replace(outputs[0], _outputs(node, outputs[1]) + "\n", 1)
    # Functions: a replacement's backslashes would be read again.
    text = _INPUTS.sub(lambda _: _inputs(node), text)
    return _PICTURE.sub(lambda found: _picture(found[1]), text)


def _picture(workflow: str) -> str:
    return f"![The workflow {workflow} and its result]({PICTURES}/{workflow}.jpg)"


def _inputs(node: dict[str, Any]) -> str:
    rows = []
    for kind in ("required", "optional"):
        for name, (type_, *rest) in node["input"].get(kind, {}).items():
            options = rest[0] if rest else {}
            what = _type(type_, options) + (", optional" if kind == "optional" else "")
            rows.append((name, what, _meaning(options)))
    return _table("Input", rows)


def _outputs(node: dict[str, Any], lines: str) -> str:
    meanings = dict(line.split(": ", 1) for line in lines.splitlines())
    if list(meanings) != node["output_name"]:
        raise ValueError(
            f"tools/help/{node['name']}.md says what the outputs {', '.join(meanings) or '(none)'} "
            f"are; the node has {', '.join(node['output_name'])}, in this order."
        )
    listed = ("list of " if several else "" for several in node["output_is_list"])
    types = (some + type_ for some, type_ in zip(listed, node["output"], strict=True))
    rows = zip(meanings, map(_escaped, types), meanings.values(), strict=True)
    return _table("Output", rows)


def _meaning(options: dict[str, Any]) -> str:
    """The tooltips of an input, and of the entries that a growing one is made of."""
    entries = options.get("template", {}).get("input", {}).get("required", {}).values()
    tooltips = [own.get("tooltip", "") for own in (options, *(entry[1] for entry in entries))]
    text = _escaped(" ".join(filter(None, tooltips)))
    if _explained(options):
        return _CHOICE.sub(r"<br>`\1`:", text).replace(" <br>", "<br>").removeprefix("<br>")
    return text


def _explained(options: dict[str, Any]) -> bool:
    """Whether the tooltip has a sentence on each choice, which then need not be listed."""
    choices = options.get("options", ())
    return bool(choices) and {*choices} <= {*_CHOICE.findall(options.get("tooltip", ""))}


def _type(type_: str, options: dict[str, Any]) -> str:
    """Type, range and default of an input, for people."""
    if type_ == "COMFY_AUTOGROW_V3":
        template = options["template"]
        ((entry, *_),) = template["input"]["required"].values()
        return f"{template['min']} to {template['max']} of {_escaped(entry)}"
    if type_ == "COMBO":
        return _choices(options)
    parts = [_escaped(type_)]
    if not options.get("forceInput"):
        if "min" in options:
            parts.append(f"{_number(options['min'])} to {_number(options['max'])}")
        if "default" in options:
            parts.append(f"default {_default(options['default'])}")
    return ", ".join(parts)


def _choices(options: dict[str, Any]) -> str:
    """Lists of files have no default; what is in them is another thing on every machine."""
    if "default" not in options:
        return "a file from the list"
    default = options["default"]
    if _explained(options):
        return f"a choice, default `{default}`"
    shown = (f"`{x}`" + (" (default)" if x == default else "") for x in options["options"])
    return "one of " + ", ".join(shown)


def _default(value: Any) -> str:
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return _number(value)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _escaped(text: str) -> str:
    """As words in a table's cell."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def _table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Two columns, name and the rest: the panel has no room for more."""
    lines = [f"| `{name}` | *{what}*<br>{meaning} |" for name, what, meaning in rows]
    return "\n".join([f"## {head}s", "", f"| {head} | Meaning |", "| --- | --- |", *lines])


def write(info: ObjectInfo) -> Iterator[Path]:
    """Write pages and pictures; what was written."""
    (DOCS / PICTURES).mkdir(parents=True, exist_ok=True)
    for name, text in build(info).items():
        (DOCS / name).write_text(text, encoding="utf-8")
        yield DOCS / name
    for picture in pictures():
        yield Path(shutil.copyfile(picture, DOCS / PICTURES / picture.name))


def main() -> None:
    with Server(standins.ensure(), host.require()) as client:
        info = client.object_info()
    for path in write(info):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
