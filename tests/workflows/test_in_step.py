"""The two formats say the same, and what the host's node classes say."""

from __future__ import annotations

import json
from typing import Any
from urllib import request

import pytest

from tools.generated import out_of_step
from tools.workflows.export import build

DRAWN = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "CURVE"}
"""Types that the editor draws as widgets."""


def declared(info: dict[str, Any], type_: str) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """A class's inputs in its own order: name to (type, options, required)."""
    return {
        name: (spec[0], spec[1] if len(spec) > 1 else {}, kind == "required")
        for kind in ("required", "optional")
        for name, spec in info[type_]["input"].get(kind, {}).items()
    }


def drawn(type_: Any, options: dict[str, Any]) -> bool:
    return (isinstance(type_, list) or type_ in DRAWN) and not options.get("forceInput")


def exported(editor: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """What the editor would send to the server, worked out from its own file alone."""
    came_from = {link[0]: [str(link[1]), link[2]] for link in editor["links"]}
    prompt = {}
    for node in editor["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, (type_, options, _) in declared(info, node["type"]).items():
            if drawn(type_, options):
                inputs[name] = next(values)
                if options.get("control_after_generate"):
                    assert next(values) in ("fixed", "randomize", "increment", "decrement")
        assert list(values) in ([], ["image"]), "only the upload button may be left"
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = came_from[slot["link"]]
        title = node.get("title", info[node["type"]]["display_name"])
        prompt[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": title},
        }
    return prompt


def test_files_are_what_the_api_format_and_the_nodes_give(object_info):
    assert out_of_step(build(object_info)) == [], "run `python -m tools.workflows.export`"


def test_both_formats_say_the_same(workflow, object_info):
    assert exported(workflow.editor, object_info) == workflow.api


@pytest.mark.parametrize("list_, at", [("widgets_values", 0), ("links", 1)])
def test_a_change_in_one_format_is_seen(workflow, object_info, list_, at):
    """So that the comparison above cannot pass by looking at nothing."""
    editor = workflow.editor
    holder = next(node for node in workflow.nodes if node["type"] == "KSampler")
    target = holder if list_ == "widgets_values" else editor
    if list_ == "widgets_values":
        target[list_][at] += 1
    else:
        target[list_][at][1] = next(
            node["id"] for node in workflow.nodes if node["id"] != target[list_][at][1]
        )
    assert exported(editor, object_info) != workflow.api


def test_sockets_are_the_classes_own(workflow, object_info):
    for node in workflow.nodes:
        own = object_info[node["type"]]
        outputs = [(output["name"], output["type"]) for output in node["outputs"]]
        classes = list(zip(own["output_name"], own["output"], strict=True))
        # Some hosts give the nodes that end a workflow an output; nothing here uses it.
        assert outputs == classes or (own["output_node"] and outputs == [])
        sockets = {slot["name"]: slot["type"] for slot in node["inputs"]}
        for name, (type_, options, required) in declared(object_info, node["type"]).items():
            if type_ == "COMFY_AUTOGROW_V3":
                ((entry, *_),) = options["template"]["input"]["required"].values()
                grown = [key for key in sockets if key.startswith(f"{name}.")]
                assert {sockets.pop(key) for key in grown} == {entry}
            elif not drawn(type_, options):
                assert sockets.pop(name) == type_
                (slot,) = (slot for slot in node["inputs"] if slot["name"] == name)
                assert slot["link"] is not None or not required
            elif name in sockets:  # a widget that is linked instead
                assert sockets.pop(name) == type_
                (slot,) = (slot for slot in node["inputs"] if slot["name"] == name)
                assert slot["widget"] == {"name": name} and slot["link"] is not None
        assert sockets == {}


def test_links_join_equal_types_and_are_known_at_both_ends(workflow):
    nodes = {node["id"]: node for node in workflow.editor["nodes"]}
    links = workflow.editor["links"]
    assert len({link[0] for link in links}) == len(links) == workflow.editor["last_link_id"]
    for id_, source, start, target, end, type_ in links:
        output, slot = nodes[source]["outputs"][start], nodes[target]["inputs"][end]
        assert output["type"] == slot["type"] == type_
        assert slot["link"] == id_ and id_ in output["links"]
    ends = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"]]
    assert sorted(ends) == sorted(link[0] for link in links)
    assert max(nodes) == workflow.editor["last_node_id"]


def test_values_are_ones_that_the_classes_allow(workflow, object_info):
    for node in workflow.api.values():
        for name, (type_, options, required) in declared(object_info, node["class_type"]).items():
            if not drawn(type_, options):
                continue
            assert name in node["inputs"] or not required
            value = node["inputs"][name]
            if isinstance(value, list) and not isinstance(type_, list):
                continue  # linked
            choices = type_ if isinstance(type_, list) else options.get("options")
            if choices is not None:
                assert value in choices, f"{node['class_type']}.{name}"
            elif type_ in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


def test_the_host_offers_them_as_templates_with_their_pictures(client, folder):
    """And those for headless runs not: the host looks no deeper than `workflows/`."""
    direct = request.build_opener(request.ProxyHandler({}))
    base = f"http://{client.address}/api/workflow_templates"
    with direct.open(base) as answer:
        offered = json.load(answer)
    (pack,) = (name for name, templates in offered.items() if "image_only" in templates)
    assert sorted(offered[pack]) == sorted(path.stem for path in folder.glob("*.json"))
    for path in (*folder.glob("*.json"), *folder.glob("*.jpg")):
        with direct.open(f"{base}/{pack}/{path.name}") as answer:
            assert answer.read() == path.read_bytes()
