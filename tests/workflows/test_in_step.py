"""The two formats say the same, and what the host's node classes say."""

from __future__ import annotations

import json

from tools.comfyui.install import ROOT
from tools.generated import out_of_step
from tools.workflows.api import FOLDER
from tools.workflows.export import build

DRAWN = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "CURVE"}
"""Types that the editor draws as widgets."""


def declared(info, type_):
    """Return a class's inputs in its own order: name to (type, options, required)."""
    return {
        name: (spec[0], spec[1] if len(spec) > 1 else {}, kind == "required")
        for kind in ("required", "optional")
        for name, spec in info[type_]["input"].get(kind, {}).items()
    }


def drawn(type_, options):
    return (isinstance(type_, list) or type_ in DRAWN) and not options.get("forceInput")


def exported(editor, info):
    """Return what the editor would send to the server, worked out from its own file alone."""
    came_from = {link[0]: [str(link[1]), link[2]] for link in editor["links"]}
    prompt = {}
    for node in editor["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node["widgets_values"])
        inputs = {}
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


def check_sockets(nodes, info):
    """They are the classes' own."""
    for node in nodes:
        own = info[node["type"]]
        outputs = [(output["name"], output["type"]) for output in node["outputs"]]
        classes = list(zip(own["output_name"], own["output"], strict=True))
        # Some hosts give the nodes that end a workflow an output; nothing here uses it.
        assert outputs == classes or (own["output_node"] and outputs == [])
        sockets = {slot["name"]: slot for slot in node["inputs"]}
        for name, (type_, options, required) in declared(info, node["type"]).items():
            if type_ == "COMFY_AUTOGROW_V3":
                ((entry, *_),) = options["template"]["input"]["required"].values()
                grown = [key for key in sockets if key.startswith(f"{name}.")]
                assert {sockets.pop(key)["type"] for key in grown} == {entry}
            elif not drawn(type_, options):
                slot = sockets.pop(name)
                assert slot["type"] == type_
                assert slot["link"] is not None or not required
            elif slot := sockets.pop(name, None):  # a widget that is linked instead
                assert (slot["type"], slot["widget"]) == (type_, {"name": name})
                assert slot["link"] is not None
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


def check_values(api, info):
    """They are ones that the classes allow."""
    for node in api.values():
        for name, (type_, options, required) in declared(info, node["class_type"]).items():
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


def test_nodes_are_as_their_classes(workflow, object_info):
    check_sockets(workflow.nodes, object_info)
    check_values(workflow.api, object_info)


def test_blueprints_hold_nodes_as_their_classes_are(object_info, subtests):
    """They are kept as the editor saved them."""
    ends = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    for path in (ROOT / "subgraphs").iterdir():
        (inner,) = json.loads(path.read_text("utf-8"))["definitions"]["subgraphs"]
        links = [[link[end] for end in ends] for link in inner["links"]]
        with subtests.test(path.name):
            assert path.name == f"{inner['name']}.json"
            check_sockets(inner["nodes"], object_info)
            check_values(exported({**inner, "links": links}, object_info), object_info)


def test_the_host_offers_them_as_templates_with_their_pictures(client, opened):
    """And those for headless runs not: the host looks no deeper than `workflows/`."""
    offered = client.get("/api/workflow_templates")
    (pack,) = (name for name, templates in offered.items() if "image_only" in templates)
    assert sorted(offered[pack]) == sorted(path.stem for path in FOLDER.glob("*.json"))
    for path in (*FOLDER.glob("*.json"), *FOLDER.glob("*.jpg")):
        with opened(f"/api/workflow_templates/{pack}/{path.name}") as answer:
            assert answer.read() == path.read_bytes()
