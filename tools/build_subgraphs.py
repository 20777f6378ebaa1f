"""Write the subgraph blueprints: the two most common tasks as one node each.

    python -m tools.build_subgraphs

They stand in the editor's node library under IP-Adapter; `subgraphs/` is where ComfyUI looks.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.support import standins
from tools.comfyui import install as host
from tools.comfyui.install import ROOT
from tools.comfyui.server import Server
from tools.workflows.editor import PACK, dump, editor_node
from tools.workflows.graph import Graph, Node, ObjectInfo, Output, slot_of
from tools.workflows.layout import GAP, MARGIN
from tools.workflows.slots import inputs_of, is_widget

FOLDER = ROOT / "subgraphs"
INSIDE, OUTSIDE = -10, -20  # the nodes that stand for a subgraph's inputs and outputs
CATEGORY = "IP-Adapter"
LORA = (
    "Adapter and encoder are found automatically. Put a LoRA behind this node: in front, each "
    "change of it would load the files again."
)
WIDTH = 320
Json = dict[str, Any]


@dataclass(frozen=True)
class Inlet:
    """An input of the blueprint: `name` outside, and the inputs inside that it feeds."""

    name: str
    feeds: tuple[tuple[Node, str], ...]


@dataclass(frozen=True)
class Blueprint:
    """`graph` inside, whose note is the description."""

    graph: Graph
    inlets: tuple[Inlet, ...]
    outlet: Output


def image_prompt() -> Blueprint:
    graph = Graph("Image Prompt", f"Makes a model follow a picture. {LORA}")
    found = graph.add("IPA_AutoLoad", preset="standard")
    prompt = graph.add("IPA_EncodeImage", clip_vision=found["clip_vision"], crop="center")
    applied = _apply(graph, found, prompt, 0.6)
    inlets = (
        Inlet("model", ((found, "model"), (applied, "model"))),
        Inlet("image", ((prompt, "image"),)),
        Inlet("adapter_preset", ((found, "preset"),)),
        *(Inlet(name, ((applied, name),)) for name in ("weight", "start_at", "end_at")),
    )
    return Blueprint(graph, inlets, applied["model"])


def style_transfer() -> Blueprint:
    graph = Graph(
        "Style Transfer",
        "Takes colours and style from a picture, and leaves what is to be seen to the text. "
        f"{LORA}",
    )
    found = graph.add("IPA_AutoLoad", preset="standard")
    weights = graph.add("IPA_LayerWeights", preset="style", changes="")
    prompt = graph.add("IPA_EncodeImage", clip_vision=found["clip_vision"], crop="center")
    applied = _apply(graph, found, prompt, 1.0, layer_weights=weights["layer_weights"])
    inlets = (
        Inlet("model", ((found, "model"), (weights, "model"), (applied, "model"))),
        Inlet("image", ((prompt, "image"),)),
        Inlet("adapter_preset", ((found, "preset"),)),
        Inlet("style_preset", ((weights, "preset"),)),
        Inlet("weight", ((applied, "weight"),)),
    )
    return Blueprint(graph, inlets, applied["model"])


BLUEPRINTS = (image_prompt, style_transfer)


def _apply(graph: Graph, found: Node, prompt: Node, weight: float, **more: Any) -> Node:
    knobs = {"weight": weight, "start_at": 0.0, "end_at": 1.0, "combine": "concat", **more}
    return graph.add(
        "IPA_Apply", adapter=found["adapter"], image_prompt=prompt["image_prompt"], **knobs
    )


def to_blueprint(made: Blueprint, info: ObjectInfo) -> Json:
    """The blueprint as a file that the editor reads: one node, and the subgraph that it is of."""
    own = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{made.graph.name}"))
    outside = [_outer_input(inlet, info) for inlet in made.inlets]
    values = [inlet.feeds[0][0].inputs[inlet.feeds[0][1]] for inlet in _widgets(made, info)]
    type_ = _type_of(made.outlet, made.graph, info)
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [
            {
                "id": 1,
                "type": own,
                "pos": [0, 0],
                "size": [WIDTH, 80 + 26 * len(made.inlets)],
                "flags": {},
                "order": 0,
                "mode": 0,
                "inputs": outside,
                "outputs": [{"name": made.outlet.name, "type": type_, "links": None}],
                "properties": {
                    "proxyWidgets": [["-1", inlet.name] for inlet in _widgets(made, info)]
                },
                "widgets_values": values,
                "title": made.graph.name,
            }
        ],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [_subgraph(made, own, info)]},
        "extra": {},
    }


def _widgets(made: Blueprint, info: ObjectInfo) -> Iterator[Inlet]:
    return (inlet for inlet in made.inlets if _declared(inlet, info)[1])


def _declared(inlet: Inlet, info: ObjectInfo) -> tuple[str, bool]:
    """Type of an inlet, and whether it is a widget."""
    node, input_ = inlet.feeds[0]
    found = {name: (type_, options) for name, type_, options, _ in inputs_of(node, info)}
    type_, options = found[input_]
    return "COMBO" if isinstance(type_, list) else type_, is_widget(type_, options)


def _outer_input(inlet: Inlet, info: ObjectInfo) -> Json:
    type_, widget = _declared(inlet, info)
    slot: Json = {"name": inlet.name, "type": type_, "link": None}
    return slot | ({"widget": {"name": inlet.name}} if widget else {})


def _type_of(output: Output, graph: Graph, info: ObjectInfo) -> str:
    own = info[graph.nodes[output.node - 1].type]
    return str(own["output"][slot_of(output, graph, info)])


def _subgraph(made: Blueprint, own: str, info: ObjectInfo) -> Json:
    graph = made.graph
    links: list[list[Any]] = []
    nodes = [editor_node(node, graph, info, links) for node in graph.nodes]
    for number, node in enumerate(nodes):
        node["pos"], node["order"] = [number * (WIDTH + 2 * GAP), 0], number
    inputs = []
    for place, inlet in enumerate(made.inlets):
        type_, _ = _declared(inlet, info)
        ids = []
        for target, name in inlet.feeds:
            ids.append(len(links) + 1)
            slots = nodes[target.id - 1]["inputs"]
            slot = next((slot for slot in slots if slot["name"] == name), None)
            if slot is None:
                slot = {"name": name, "type": type_, "widget": {"name": name}}
                slots.append(slot)
            slot["link"] = ids[-1]
            links.append([ids[-1], INSIDE, place, target.id, slots.index(slot), type_])
        inputs.append(_socket(own, inlet.name, type_, ids))
    end = len(links) + 1
    type_ = _type_of(made.outlet, graph, info)
    slot = slot_of(made.outlet, graph, info)
    links.append([end, made.outlet.node, slot, OUTSIDE, 0, type_])
    for node in nodes:
        for index, output in enumerate(node["outputs"]):
            mine = [link[0] for link in links if link[1:3] == [node["id"], index]]
            output["links"] = mine or None
    right = len(nodes) * (WIDTH + 2 * GAP)
    return {
        "id": own,
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": len(nodes),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": graph.name,
        "description": graph.note,
        "category": CATEGORY,
        "inputNode": {"id": INSIDE, "bounding": [-200, 0, 140, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTSIDE, "bounding": [right + MARGIN, 0, 120, 60]},
        "inputs": inputs,
        "outputs": [_socket(own, made.outlet.name, type_, [end])],
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": [
            dict(
                zip(
                    ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"),
                    link,
                    strict=True,
                )
            )
            for link in links
        ],
        "extra": {},
    }


def _socket(own: str, name: str, type_: str, links: list[int]) -> Json:
    id_ = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{own}/{name}"))
    return {"id": id_, "name": name, "type": type_, "linkIds": links}


def build(info: ObjectInfo) -> dict[str, str]:
    """Every file's text by its name."""
    made = [describe() for describe in BLUEPRINTS]
    return {f"{own.graph.name}.json": dump(to_blueprint(own, info)) for own in made}


def main() -> None:
    with Server(standins.ensure(), host.require()) as client:
        info = client.object_info()
    FOLDER.mkdir(exist_ok=True)
    for name, text in build(info).items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"subgraphs/{name}")


if __name__ == "__main__":
    main()
