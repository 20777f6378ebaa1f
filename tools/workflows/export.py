"""Write the example workflows for ComfyUI's editor (schema 0.4), made from their API format.

    python -m tools.workflows.export [--check]

To add a workflow, save it in the editor with *Export (API)* as workflows/api/<name>.json, write its
note, notes/<name>.md, and run this and tools.workflows.pictures. The nodes get columns, a titled
frame for each step; beside them stand the note, in which `{settings}` is the paragraph of
notes/shared/settings.md, and a list of the model files with their downloads, which the nodes that
name them carry too.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ip_adapter_core.files.published import Weights
from tools.generated import PREFIX, Files, ObjectInfo, command, inputs_of
from tools.workflows.api import BASE, FOLDER, NAMES, PUBLIC, VIT_H, Api, fed_by, is_link, read

NOTES = Path(__file__).with_name("notes")
PACK = "comfyui-ip-adapter"
"""The name under which the registry knows this pack, so that ComfyUI can offer it."""

STEPS = {
    "Models": "CheckpointLoaderSimple UNETLoader DualCLIPLoader VAELoader CLIPVisionLoader"
    " IPA_LoadAdapter IPA_AutoLoad IPA_LoadFaceEncoder ControlNetLoader",
    "Pictures": "LoadImage LoadImageMask InvertMask BatchImagesNode",
    "Text": "CLIPTextEncode FluxGuidance ConditioningZeroOut",
    "Image prompt": "IPA_EncodeImage IPA_EncodeFace IPA_Apply IPA_ApplyConditioning"
    " IPA_ApplyRegions IPA_LayerWeights IPA_LatentWeights IPA_CombinePrompts IPA_PrepareImage"
    " IPA_NegativeNoise IPA_SavePrompt IPA_LoadPrompt IPA_GridValues IPA_RecordAttention"
    " CurveEditor",
    "Structure": "Canny ControlNetApplyAdvanced",
    "Regions": "ConditioningSetAreaPercentage ConditioningCombine",
    "Start picture": "ImageToMask VAEEncode SetLatentNoiseMask",
    "Sampling": "EmptyLatentImage EmptySD3LatentImage KSampler VAEDecode",
    "Result": "ImageCompositeMasked IPA_AttentionMap IPA_DrawGrid SaveImage",
}
"""The columns, and the node classes in each. Of others, the column of the first that they feed."""
STEP_OF = {class_: step for step, classes in STEPS.items() for class_ in classes.split()}
LEAST = {
    "LoadImage": (300, 330),
    "LoadImageMask": (300, 340),
    "CLIPTextEncode": (380, 140),
    "CurveEditor": (300, 340),
    "IPA_EncodeFace": (300, 500),
    "IPA_LayerWeights": (340, 420),
    "IPA_LatentWeights": (300, 180),
    "IPA_PrepareImage": (300, 460),
    "IPA_AttentionMap": (460, 620),
    "IPA_DrawGrid": (460, 520),
    "SaveImage": (460, 520),
}
"""Room for images and text, which slots and widgets alone would not give."""
TITLE, GAP, MARGIN, HEADING = 30, 44, 20, 50  # a position is below the node's title bar
NOTE_WIDTH = 420
OURS = {"color": "#233", "bgcolor": "#355"}
POSITIVE = {"color": "#232", "bgcolor": "#353"}
NEGATIVE = {"color": "#322", "bgcolor": "#533"}
NOTE = {"color": "#222", "bgcolor": "#000"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "CURVE"}
FOUND = {"IPA_AutoLoad": [BASE, VIT_H]}
"""Files that a node looks for without naming them, as the workflows set it."""

Json = dict[str, Any]


def build(info: ObjectInfo) -> Files:
    """Return every workflow's file for the editor, and the source with what is new to a node."""
    files: Files = {}
    for name in NAMES:
        api = _completed(read(name), info)
        both = {f"api/{name}.json": api, f"{name}.json": to_editor(name, api, note(name), info)}
        for path, made in both.items():
            files[FOLDER / path] = (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _completed(api: Json, info: ObjectInfo) -> Json:
    """Return the workflow with the defaults of widgets that it has no value for."""
    for node in api.values():
        given = node["inputs"]
        for name, type_, options, _ in _declared(node["class_type"], given, info):
            if name not in given and is_widget(type_, options):
                given[name] = options["default"]
    return api


def note(name: str) -> str:
    """Return a workflow's note, each paragraph in one line, as the editor shows line ends."""

    def shared(line: re.Match[str]) -> str:
        return (NOTES / "shared" / f"{line[1]}.md").read_text("utf-8")

    text = (NOTES / f"{name}.md").read_text("utf-8")
    text = re.sub(r"^\{(\w+)\}$", shared, text, flags=re.M)
    blocks = re.split(r"\n{2,}", text.strip())
    return "\n\n".join(" ".join(block.split()) for block in blocks) + "\n"


def to_editor(name: str, api: Api, about: str, info: ObjectInfo) -> Json:
    """Return a workflow as the editor reads it: nodes, links, frames, and two notes."""
    links: list[list[Any]] = []
    nodes = [_node(id_, api, info, links) for id_ in api]
    for node in nodes:
        for index, output in enumerate(node["outputs"]):
            mine = [link[0] for link in links if link[1:3] == [node["id"], index]]
            output["links"] = mine or None
    groups = _place([_step(id_, api) for id_ in api], nodes)
    notes = _notes(len(nodes), {"About this workflow": about, "Models": _downloads(api)})
    for order, node in enumerate(notes + nodes):
        node["order"] = order
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{name}")),
        "revision": 0,
        "last_node_id": len(nodes) + len(notes),
        "last_link_id": len(links),
        "nodes": notes + nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"workflowRendererVersion": "LG"},
        "version": 0.4,
    }


def _node(id_: str, api: Api, info: ObjectInfo, links: list[list[Any]]) -> Json:
    """Return a node without its place, and append its incoming links."""
    given, class_ = api[id_]["inputs"], api[id_]["class_type"]
    title, own = api[id_]["_meta"]["title"], info[class_]
    slots: list[Json] = []
    values: list[Any] = []
    uploads: list[str] = []
    for name, type_, options, optional in _declared(class_, given, info):
        value = given.get(name)
        linked, slot = is_link(value), {"name": name, "type": type_, "link": None}
        if is_widget(type_, options):
            # A widget that a link overrides keeps a value, which nothing reads.
            values.append(options["default"] if linked else value)
            values += ["fixed"] if options.get("control_after_generate") else []
            uploads += ["image"] if options.get("image_upload") else []
            if not linked:
                continue
            slot["widget"] = {"name": name}
        if "." in name:
            slot["label"] = name.partition(".")[2]
        if optional:
            slot["shape"] = 7
        if linked:
            slot["link"] = len(links) + 1
            links.append([slot["link"], int(value[0]), value[1], int(id_), len(slots), type_])
        slots.append(slot)
    # Older hosts give the nodes that end a workflow no outputs, and nothing here uses them.
    ends = own["output_node"] and not class_.startswith(PREFIX)
    outputs = [
        {"name": name, "type": type_, "links": None}
        for name, type_ in zip(own["output_name"], own["output"], strict=True)
        if not ends
    ]
    least = LEAST.get(class_, (0, 0))
    width = 420 if _step(id_, api) == "Models" else 300
    height = 22 * max(len(slots), len(outputs)) + 26 * len(values) + 24
    return {
        "id": int(id_),
        "type": class_,
        "pos": [0, 0],
        "size": [max(width, least[0]), max(height, least[1])],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": slots,
        "outputs": outputs,
        **({} if title in (own["display_name"], class_) else {"title": title}),
        "properties": _properties(class_, values),
        "widgets_values": values + uploads,
        **_colors(class_, title),
    }


def _declared(
    class_: str, given: Mapping[str, Any], info: ObjectInfo
) -> Iterator[tuple[str, Any, Json, bool]]:
    """Yield a class's inputs in order, as (name, type, options, optional).

    A growing list becomes the entries that are `given` and the empty one that the editor keeps at
    its end.
    """
    for name, type_, options, optional in inputs_of(info[class_]):
        if type_ != "COMFY_AUTOGROW_V3":
            yield name, type_, options, optional
            continue
        template = options["template"]
        ((entry_type, *_),) = template["input"]["required"].values()
        used = sum(key.startswith(f"{name}.") for key in given)
        for index in range(used + 1):
            entry = f"{name}.{template['prefix']}{index}"
            yield entry, entry_type, {}, index >= template["min"]


def is_widget(type_: Any, options: Mapping[str, Any]) -> bool:
    """Return whether the editor draws the input as a control instead of a socket."""
    return (isinstance(type_, list) or type_ in WIDGETS) and not options.get("forceInput", False)


def _properties(class_: str, values: Sequence[Any]) -> Json:
    """Return which pack the node is from, and which files it needs."""
    models = [
        {"name": file.name, "url": file.url, "directory": file.directory}
        for file in _files(class_, values)
    ]
    return {
        "cnr_id": PACK if class_.startswith(PREFIX) else "comfy-core",
        "Node name for S&R": class_,
        **({"models": models} if models else {}),
    }


def _files(class_: str, values: Iterable[Any]) -> list[Weights]:
    named = [PUBLIC[value] for value in values if isinstance(value, str) and value in PUBLIC]
    return named or FOUND.get(class_, [])


def _colors(class_: str, title: str) -> Json:
    if class_.startswith(PREFIX):
        return OURS
    if class_ == "CLIPTextEncode":
        return NEGATIVE if "Negative" in title else POSITIVE
    return {}


def _step(id_: str, api: Api) -> str:
    """Return the column that a node stands in."""
    return STEP_OF.get(api[id_]["class_type"]) or _step(next(fed_by(api, id_)), api)


def _place(steps: Sequence[str], nodes: Sequence[Json]) -> list[Json]:
    """Give the nodes their positions, and return the frames around the steps."""
    frames: list[Json] = []
    left = 0
    for step in filter(steps.__contains__, STEPS):
        members = [node for node, own in zip(nodes, steps, strict=True) if own == step]
        y = HEADING + TITLE
        for node in members:
            node["pos"] = [left + MARGIN, y]
            y += node["size"][1] + TITLE + GAP
        width = max(node["size"][0] for node in members) + 2 * MARGIN
        frames.append(
            {
                "id": len(frames) + 1,
                "title": f"{len(frames) + 1} · {step}",
                "bounding": [left, 0, width, y - TITLE - GAP + MARGIN],
                "color": "#3f789e",
                "font_size": 24,
                "flags": {},
            }
        )
        left += width + GAP
    return frames


def _notes(last_id: int, texts: Mapping[str, str]) -> list[Json]:
    """Return the notes, one below the other, left of the nodes."""
    y = TITLE
    notes: list[Json] = []
    for id_, (title, text) in enumerate(texts.items(), last_id + 1):
        # A line of the note's width holds about 64 letters; of a link its name is shown.
        shown = re.sub(r"\]\([^)]*\)", "]", text).splitlines()
        height = 60 + 18 * sum(max(1, -(-len(line) // 64)) for line in shown)
        notes.append(
            {
                "id": id_,
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
                **NOTE,
            }
        )
        y += height + TITLE + GAP
    return notes


def _downloads(api: Api) -> str:
    """Return the model files by folder, with their links and the names to save them under."""
    classes = ((node["class_type"], node["inputs"].values()) for node in api.values())
    folders: dict[str, list[str]] = {}
    for file in dict.fromkeys(file for needs in classes for file in _files(*needs)):
        saved = f" (a browser saves it as `{file.saved_as}`: rename it)"
        line = f"- [{file.name}]({file.url}){saved if file.saved_as != file.name else ''}"
        folders.setdefault(file.directory, []).append(line)
    blocks = ("\n".join([f"**models/{folder}**\n", *lines]) for folder, lines in folders.items())
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    command(__doc__, build)
