"""What of a node class is a socket and what is a widget, read from `/object_info`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tools.workflows.graph import Node, ObjectInfo, Output

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "CURVE"}
GROWING = "COMFY_AUTOGROW_V3"


def inputs_of(node: Node, info: ObjectInfo) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """The class's inputs in order, as (name, type, options, optional).

    A growing list becomes the entries that the node uses and the empty one that the editor
    keeps at its end.
    """
    declared = info[node.type]["input"]
    for kind in ("required", "optional"):
        for name, (type_, *rest) in declared.get(kind, {}).items():
            options = rest[0] if rest else {}
            if type_ != GROWING:
                yield name, type_, options, kind == "optional"
                continue
            template = options["template"]
            ((entry_type, *_),) = template["input"]["required"].values()
            used = sum(key.startswith(f"{name}.") for key in node.inputs)
            for index in range(used + 1):
                entry = f"{name}.{template['prefix']}{index}"
                yield entry, entry_type, {}, index >= template["min"]


def is_widget(type_: Any, options: dict[str, Any]) -> bool:
    """Whether the editor draws the input as a control instead of a socket."""
    drawn = isinstance(type_, list) or type_ in WIDGETS
    return drawn and not options.get("forceInput", False)


def widget_values(node: Node, info: ObjectInfo) -> list[Any]:
    """The values in the order in which the editor keeps them, its own controls included."""
    values: list[Any] = []
    uploads = []
    for name, type_, options, _ in inputs_of(node, info):
        if not is_widget(type_, options):
            continue
        value = node.inputs[name]
        # A widget that a link overrides keeps a value, which nothing reads.
        values.append(options["default"] if isinstance(value, Output) else value)
        if options.get("control_after_generate"):
            values.append("fixed")
        if options.get("image_upload"):
            uploads.append("image")
    return values + uploads
