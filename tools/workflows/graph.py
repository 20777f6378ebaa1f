"""A workflow as nodes and links, and the API format that `POST /prompt` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ObjectInfo = Mapping[str, Any]
"""What the server answers to `GET /object_info`: one entry a node class."""


@dataclass(frozen=True)
class Output:
    """One output of a node, by the name that the node's class gives it."""

    node: int
    name: str


@dataclass(frozen=True)
class Node:
    """`inputs` maps input names to widget values or to other nodes' outputs."""

    id: int
    type: str
    title: str
    inputs: Mapping[str, Any]
    step: str | None = None

    def __getitem__(self, output: str) -> Output:
        return Output(self.id, output)

    def sources(self) -> Iterator[tuple[str, Output]]:
        """The linked inputs, as (input name, where it comes from)."""
        for name, value in self.inputs.items():
            if isinstance(value, Output):
                yield name, value


@dataclass
class Graph:
    """A task: `name` is the file's, `note` (markdown) is shown beside the graph."""

    name: str
    note: str
    nodes: list[Node] = field(default_factory=list)

    def add(
        self, type: str, title: str | None = None, step: str | None = None, **inputs: Any
    ) -> Node:
        """Append a node. `title` and `step` (its column) stand where the type's own do not do.

        A `__` in an input's name stands for the dot of a growing list: `images__image0`.
        """
        named = {name.replace("__", "."): value for name, value in inputs.items()}
        node = Node(len(self.nodes) + 1, type, title or "", named, step)
        self.nodes.append(node)
        return node

    def title_of(self, node: Node, info: ObjectInfo) -> str:
        """What the node's title bar reads."""
        return node.title or info[node.type]["display_name"] or node.type


def slot_of(output: Output, graph: Graph, info: ObjectInfo) -> int:
    """The output's index. Raises ValueError if the node has no output of that name."""
    source = graph.nodes[output.node - 1]
    return list(info[source.type]["output_name"]).index(output.name)


def to_api(graph: Graph, info: ObjectInfo) -> dict[str, Any]:
    """The graph as `POST /prompt` takes it, with the titles that the editor exports."""

    def wire(value: Any) -> Any:
        if isinstance(value, Output):
            return [str(value.node), slot_of(value, graph, info)]
        return value

    return {
        str(node.id): {
            "inputs": {name: wire(value) for name, value in node.inputs.items()},
            "class_type": node.type,
            "_meta": {"title": graph.title_of(node, info)},
        }
        for node in graph.nodes
    }
