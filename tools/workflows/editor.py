"""The workflow format that ComfyUI's editor loads (schema 0.4)."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from tools.workflows.graph import Graph, Node, ObjectInfo, slot_of
from tools.workflows.layout import GAP, STEP_OF, place, size_of
from tools.workflows.public import BASE, PUBLIC, VIT_H
from tools.workflows.slots import inputs_of, is_widget, widget_values

PACK = "comfyui-ip-adapter"
"""The name under which the registry knows this pack, so that the host can offer it."""
OURS = ("#233", "#355")
POSITIVE = ("#232", "#353")
NEGATIVE = ("#322", "#533")
NOTE = ("#222", "#000")
FRAME = "#3f789e"
NOTE_WIDTH = 420
WANTED = {"IPA_AutoLoad": [BASE, VIT_H]}
"""Files that a node looks for without naming them, as the workflows set it."""


def to_editor(graph: Graph, info: ObjectInfo) -> dict[str, Any]:
    """The graph as a file that the editor opens: nodes, links, frames, and two notes."""
    links: list[list[Any]] = []
    nodes = [editor_node(node, graph, info, links) for node in graph.nodes]
    for node in nodes:
        for index, output in enumerate(node["outputs"]):
            mine = [link[0] for link in links if link[1:3] == [node["id"], index]]
            output["links"] = mine or None
    steps = [node.step or STEP_OF[node.type] for node in graph.nodes]
    positions, frames = place(steps, [node["size"] for node in nodes])
    for node, position in zip(nodes, positions, strict=True):
        node["pos"] = list(position)
    notes = _notes(graph, len(nodes))
    for order, node in enumerate(notes + nodes):
        node["order"] = order
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{graph.name}")),
        "revision": 0,
        "last_node_id": len(nodes) + len(notes),
        "last_link_id": len(links),
        "nodes": notes + nodes,
        "links": links,
        "groups": [
            {
                "id": number,
                "title": f"{number} · {frame.title}",
                "bounding": list(frame.box),
                "color": FRAME,
                "font_size": 24,
                "flags": {},
            }
            for number, frame in enumerate(frames, 1)
        ],
        "config": {},
        "extra": {"workflowRendererVersion": "LG"},
        "version": 0.4,
    }


def editor_node(
    node: Node, graph: Graph, info: ObjectInfo, links: list[list[Any]]
) -> dict[str, Any]:
    """One node without its place; appends its incoming links."""
    sources = dict(node.sources())
    inputs: list[dict[str, Any]] = []
    widgets = 0
    for name, type_, options, optional in inputs_of(node, info):
        slot: dict[str, Any] = {"name": name, "type": type_, "link": None}
        if is_widget(type_, options):
            widgets += 2 if options.get("control_after_generate") else 1
            if name not in sources:
                continue
            slot["widget"] = {"name": name}
        if "." in name:
            slot["label"] = name.partition(".")[2]
        if optional:
            slot["shape"] = 7
        if name in sources:
            source = sources[name]
            start = slot_of(source, graph, info)
            slot["link"] = len(links) + 1
            links.append([len(links) + 1, source.node, start, node.id, len(inputs), type_])
        inputs.append(slot)
    own = info[node.type]
    # Older hosts give the nodes that end a workflow no outputs, and nothing here uses them.
    outputs = (
        []
        if own["output_node"] and not node.type.startswith("IPA_")
        else [
            {"name": name, "type": type_, "links": None}
            for name, type_ in zip(own["output_name"], own["output"], strict=True)
        ]
    )
    step = node.step or STEP_OF[node.type]
    made: dict[str, Any] = {
        "id": node.id,
        "type": node.type,
        "pos": [0, 0],
        "size": list(size_of(node.type, max(len(inputs), len(outputs)), widgets, step)),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
    }
    if node.title:
        made["title"] = node.title
    values = widget_values(node, info)
    made["properties"] = _properties(node.type, values)
    made["widgets_values"] = values
    colors = _colors(node)
    if colors:
        made["color"], made["bgcolor"] = colors
    return made


def _properties(type_: str, values: list[Any]) -> dict[str, Any]:
    """Which pack the node is from, and which files it needs."""
    properties: dict[str, Any] = {
        "cnr_id": PACK if type_.startswith("IPA_") else "comfy-core",
        "Node name for S&R": type_,
    }
    files = [PUBLIC[value] for value in values if _public(value)] or WANTED.get(type_, [])
    if files:
        properties["models"] = [
            {"name": file.name, "url": file.url, "directory": file.directory} for file in files
        ]
    return properties


def _public(value: Any) -> bool:
    return isinstance(value, str) and value in PUBLIC


def _colors(node: Node) -> tuple[str, str] | None:
    if node.type.startswith("IPA_"):
        return OURS
    if node.type == "CLIPTextEncode":
        return NEGATIVE if "Negative" in node.title else POSITIVE
    return None


def _notes(graph: Graph, nodes: int) -> list[dict[str, Any]]:
    """What the workflow does, and the files that it needs, left of its nodes."""
    y = 30
    notes: list[dict[str, Any]] = []
    for title, text in (("About this workflow", graph.note), ("Models", _models(graph))):
        # A line of the note's width holds about 64 letters; of a link its name is shown.
        shown = re.sub(r"\]\([^)]*\)", "]", text).splitlines()
        lines = sum(max(1, -(-len(line) // 64)) for line in shown)
        height = 60 + 18 * lines
        notes.append(
            {
                "id": nodes + len(notes) + 1,
                "type": "MarkdownNote",
                "pos": [-NOTE_WIDTH - GAP, y],
                "size": [NOTE_WIDTH, height],
                "flags": {},
                "order": 0,
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "title": title,
                "properties": {},
                "widgets_values": [text],
                "color": NOTE[0],
                "bgcolor": NOTE[1],
            }
        )
        y += height + 30 + GAP
    return notes


def _models(graph: Graph) -> str:
    """The files by folder, with their links and the names to save them under."""
    named = [value for node in graph.nodes for value in node.inputs.values() if _public(value)]
    found = [file for node in graph.nodes for file in WANTED.get(node.type, [])]
    files = [*dict.fromkeys([*(PUBLIC[name] for name in named), *found])]
    parts = []
    for directory in dict.fromkeys(file.directory for file in files):
        parts.append(f"**models/{directory}**\n")
        for file in files:
            if file.directory != directory:
                continue
            rename = (
                f" (a browser saves it as `{file.saved_as}`: rename it)"
                if file.saved_as != file.name
                else ""
            )
            parts.append(f"- [{file.name}]({file.url}){rename}")
        parts.append("")
    return "\n".join(parts).strip() + "\n"


def dump(workflow: dict[str, Any]) -> str:
    """The file's text."""
    return json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"
