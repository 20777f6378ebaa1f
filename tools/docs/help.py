"""Write the pages of ComfyUI's help panel, one a node: web/docs/<id>.md, and their images.

    python -m tools.docs.help [--check]

`tools/docs/pages/<id>.md` is the prose. The line `{inputs}` in it becomes the table that the node's
schema gives, so that no page goes stale; `{outputs}` the same, with the meanings that stand in the
lines behind it as `name: meaning`; `{picture regions}` the picture of the workflow of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.comfyui.install import ROOT
from tools.generated import Files, ObjectInfo, command, inputs_of, ours, served

WORKFLOWS = ROOT / "workflows"
PAGES = ROOT / "tools" / "docs" / "pages"
DOCS = ROOT / "web" / "docs"
IMAGES = "pictures"  # beside the pages, whose links are relative to their own folder

_INPUTS = re.compile(r"^\{inputs\}$", re.M)
_OUTPUTS = re.compile(r"^\{outputs\}\n((?:\w+: .+\n?)*)", re.M)
_PICTURE = re.compile(r"^\{picture (\w+)\}$", re.M)
_CHOICE = re.compile(r"(?:^|(?<=\. ))([^.:,]+):")  # a sentence on one, in a tooltip
_MARKS = re.compile(r"([\\`*|<\[]|\b_|_\b)")  # that markdown would take for its own


def build(info: ObjectInfo) -> Files:
    """Return every page, and the images that the pages show."""
    nodes = ours(info)
    prose = {name: (PAGES / f"{name}.md").read_text(encoding="utf-8") for name in nodes}
    files = {DOCS / f"{name}.md": _page(nodes[name], prose[name]).encode() for name in nodes}
    shown = {f"{name}.jpg" for text in prose.values() for name in _PICTURE.findall(text)}
    files |= {DOCS / f"{name}.md": _served(node).encode() for name, node in served(info).items()}
    return files | {DOCS / IMAGES / name: (WORKFLOWS / name).read_bytes() for name in shown}


def _served(node: Mapping[str, Any]) -> str:
    """Return the page of a node of ComfyUI_IPAdapter_plus: one text, and where to go on."""
    told = f"# {node['display_name']}\n\n{node['description']}\n"
    menu = "*Edit* → *Rewrite ComfyUI_IPAdapter_plus nodes*"
    return f"{told}\n{menu} puts this pack's own nodes in place.\n"


def _page(node: Mapping[str, Any], prose: str) -> str:
    """Fill the prose in.

    Raises:
        ValueError: the prose lacks a table, or does not say what an output is.
    """
    name = node["name"]
    outputs = _OUTPUTS.search(prose)
    if outputs is None or not _INPUTS.search(prose):
        raise ValueError(f"tools/docs/pages/{name}.md lacks the line {{inputs}} or {{outputs}}.")
    text = f"# {node['display_name']}\n\n{prose}"
    text = text.replace(outputs[0], _outputs(node, outputs[1]) + "\n", 1)
    # Functions: a replacement's backslashes would be read again.
    text = _INPUTS.sub(lambda _: _inputs(node), text)
    return _PICTURE.sub(rf"![The workflow \1]({IMAGES}/\1.jpg)", text)


def _inputs(node: Mapping[str, Any]) -> str:
    rows = (
        (name, _type(type_, options) + (", optional" if optional else ""), _meaning(options))
        for name, type_, options, optional in inputs_of(node)
    )
    return _table("Input", rows)


def _outputs(node: Mapping[str, Any], lines: str) -> str:
    meanings = dict(line.split(": ", 1) for line in lines.splitlines())
    if list(meanings) != node["output_name"]:
        raise ValueError(
            f"tools/docs/pages/{node['name']}.md says what the outputs "
            f"{', '.join(meanings) or '(none)'} are; the node has "
            f"{', '.join(node['output_name'])}, in this order."
        )
    types = (
        _escaped(f"list of {type_}" if several else type_)
        for type_, several in zip(node["output"], node["output_is_list"], strict=True)
    )
    return _table("Output", zip(meanings, types, meanings.values(), strict=True))


def _meaning(options: Mapping[str, Any]) -> str:
    """Return the tooltips of an input, and of the entries that a growing one is made of."""
    entries = options.get("template", {}).get("input", {}).get("required", {}).values()
    tooltips = [own.get("tooltip", "") for own in (options, *(entry[1] for entry in entries))]
    text = _escaped(" ".join(filter(None, tooltips)))
    if _explained(options):
        return _CHOICE.sub(r"<br>`\1`:", text).replace(" <br>", "<br>").removeprefix("<br>")
    return text


def _explained(options: Mapping[str, Any]) -> bool:
    """Return whether the tooltip has a sentence on each choice, which then need not be listed."""
    choices = options.get("options", ())
    return bool(choices) and {*choices} <= {*_CHOICE.findall(options.get("tooltip", ""))}


def _type(type_: str, options: Mapping[str, Any]) -> str:
    """Return type, range and default of an input, for people."""
    if type_ == "COMFY_AUTOGROW_V3":
        template = options["template"]
        ((entry, *_),) = template["input"]["required"].values()
        return f"{template['min']} to {template['max']} of {_escaped(entry)}"
    if type_ == "COMBO":
        return _choices(options)
    parts = [_escaped(type_)]
    if not options.get("forceInput"):
        if "min" in options:
            parts.append(f"{_value(options['min'])} to {_value(options['max'])}")
        if "default" in options:
            parts.append(f"default {_value(options['default'])}")
    return ", ".join(parts)


def _choices(options: Mapping[str, Any]) -> str:
    """Return the choices, but of lists of files, which have no default: they differ by machine."""
    if "default" not in options:
        return "a file from the list"
    default = options["default"]
    if _explained(options):
        return f"a choice, default `{default}`"
    shown = (f"`{x}`" + (" (default)" if x == default else "") for x in options["options"])
    return "one of " + ", ".join(shown)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    """Return the text as words in a table's cell."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def _table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a table of two columns, name and the rest: the panel has no room for more."""
    lines = [f"| `{name}` | *{what}*<br>{meaning} |" for name, what, meaning in rows]
    return "\n".join([f"## {head}s", "", f"| {head} | Meaning |", "| --- | --- |", *lines])


if __name__ == "__main__":
    command(__doc__, build)
