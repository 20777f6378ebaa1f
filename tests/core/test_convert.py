"""Workflows of ComfyUI_IPAdapter_plus rewritten with native nodes, in both formats."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from ip_adapter_core.ipadapter_plus.convert import convert
from tools.comfyui.install import ROOT


def api(type_="IPAdapterAdvanced", **inputs):
    """Return a request: checkpoint 1, picture 2, encoder 3, loader 4, Apply 5, sampler 6."""
    given = {"model": ["1", 0], "ipadapter": ["4", 0], "image": ["2", 0], "clip_vision": ["3", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "b.png"}},
        "3": {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "c"}},
        "4": {"class_type": "IPAdapterModelLoader", "inputs": {"ipadapter_file": "d.bin"}},
        "5": {"class_type": type_, "inputs": {**given, "weight": 0.8, **inputs}},
        "6": {"class_type": "KSampler", "inputs": {"model": ["5", 0]}},
    }


def of(made, class_):
    return [node["inputs"] for node in made.values() if node["class_type"] == class_]


def test_a_request():
    before = api(weight_type="style transfer", start_at=0.1, end_at=0.9, attn_mask=["7", 0])
    kept = copy.deepcopy(before)
    made, report = convert(before)
    assert before == kept
    assert report == [
        "IPAdapterAdvanced (5): Apply IP-Adapter, 'style' at 0.8. A batch of masks is dealt "
        "otherwise here.",
        "IPAdapterModelLoader (4): taken out.",
    ]
    (apply,), (encode,) = of(made, "IPA_Apply"), of(made, "IPA_EncodeImage")
    (weights,), (loader,) = of(made, "IPA_LayerWeights"), of(made, "IPA_LoadAdapter")
    assert {k: v for k, v in apply.items() if not isinstance(v, list)} == {
        "weight": 0.8,
        "start_at": 0.1,
        "end_at": 0.9,
        "combine": "concat",
        "lora_weight": 1.0,
    }
    assert apply["model"] == ["1", 0] and apply["mask"] == ["7", 0]
    assert encode == {"clip_vision": ["3", 0], "image": ["2", 0], "crop": "center"}
    assert weights == {
        "model": ["1", 0],
        "preset": "style",
        "changes": "",
        "scaling": "V only",
    }
    assert loader == {"adapter_name": "d.bin"}
    (sampler,) = of(made, "KSampler")
    assert made[sampler["model"][0]]["class_type"] == "IPA_Apply"
    assert not {"4", "5"} & made.keys()


def test_parts_are_shared_and_the_encoder_of_a_preset():
    request = api("IPAdapter", weight_type="standard", start_at=0, end_at=1)
    del request["5"]["inputs"]["clip_vision"]
    request["4"] = {
        "class_type": "IPAdapterUnifiedLoader",
        "inputs": {"model": ["1", 0], "preset": "PLUS (high strength)"},
    }
    request["5"]["inputs"] |= {"model": ["4", 0], "ipadapter": ["4", 1]}
    request["7"] = {"class_type": "IPAdapter", "inputs": dict(request["5"]["inputs"], weight=0.3)}
    request["7"]["inputs"]["model"] = ["5", 0]
    request["6"]["inputs"]["model"] = ["7", 0]
    made, report = convert(request)
    (auto,) = (id_ for id_, node in made.items() if node["class_type"] == "IPA_AutoLoad")
    assert made[auto]["inputs"] == {"model": ["1", 0], "preset": "fine-grained"}
    (encode,) = of(made, "IPA_EncodeImage")
    assert encode["clip_vision"] == [auto, 1]
    first, second = of(made, "IPA_Apply")
    assert first["model"] == ["1", 0] and made[second["model"][0]]["inputs"] == first
    assert "layer_weights" not in first
    assert report[-1] == "IPAdapterUnifiedLoader (4): taken out."


@pytest.mark.parametrize("type_, inputs, expected", [
    ("IPAdapterAdvanced", {"weight_type": "style and composition"},
     [("style", 0.8), ("composition", 1.0)]),
    ("IPAdapterAdvanced", {"weight_type": "composition (SDXL)"}, [("composition", 0.8)]),
    ("IPAdapterAdvanced", {"embeds_scaling": "K+V"}, [("uniform", 0.8)]),
    ("IPAdapterPreciseStyleTransfer", {"style_boost": 0.8}, [("precise style", 0.8)]),
    ("IPAdapterPreciseStyleTransfer", {"style_boost": 1.5},
     [("style", 0.8), ("away from composition", 1.5)]),
    ("IPAdapterPreciseComposition", {}, [("composition", 0.8)]),
    ("IPAdapterPreciseComposition", {"composition_boost": 0.3},
     [("composition", 0.8), ("away from style", 0.3)]),
    ("IPAdapterStyleComposition",
     {"image_style": ["2", 0], "image_composition": ["9", 0], "weight_style": 1.2,
      "weight_composition": 0.7, "expand_style": True},
     [("strong style", 1.2), ("composition", 0.7)]),
])  # fmt: skip
def test_what_takes_layer_weights(type_, inputs, expected):
    made, _ = convert(api(type_, **inputs))
    found = [
        (made[apply["layer_weights"][0]]["inputs"]["preset"], apply["weight"])
        for apply in of(made, "IPA_Apply")
    ]
    assert found == expected


@pytest.mark.parametrize("type_, inputs, reason", [
    ("IPAdapterAdvanced", {"weight_type": "ease in"}, "ramps of 'ease in'"),
    ("IPAdapterAdvanced", {"combine_embeds": "add"}, "'add' over the pictures"),
    ("IPAdapterAdvanced", {"weight": ["8", 0]}, "'weight' comes over a link"),
    ("IPAdapterAdvanced", {"start_at": 0.9, "end_at": 0.2}, "never acts"),
    ("IPAdapterAdvanced", {"ipadapter": ["8", 0]}, "another pack's node"),
    ("IPAdapterAdvanced", {"weight": None}, "'weight' is None"),
    ("IPAdapterAdvanced", {"image": None}, "nothing is connected to 'image'"),
    ("IPAdapterAdvanced", {"model": None}, "nothing is connected to 'model'"),
    ("PrepImageForInsightFace", {"ipadapter": None}, "another resampling"),
    ("InsightFaceLoader", {"ipadapter": None}, "see Load Face Encoder"),
    ("IPAdapterTiled", {}, "tiles with a mask each"),
    ("IPAdapterTiledBatch", {}, "tiles with a mask each"),
])  # fmt: skip
def test_what_stays_and_why(type_, inputs, reason):
    request = api(type_, **inputs)
    made, report = convert(request)
    assert made["5"] == request["5"] and ("4" in made) is ("ipadapter" not in inputs)
    assert any(line.startswith(f"{type_} (5): kept") and reason in line for line in report)


def editor(subgraph=False):
    """Return the same workflow as the editor saves it, or as a subgraph of it."""
    links = [
        (1, 1, 0, 5, 0, "MODEL"),
        (2, 4, 0, 5, 1, "IPADAPTER"),
        (3, 2, 0, 5, 2, "IMAGE"),
        (4, 3, 0, 5, 3, "CLIP_VISION"),
        (5, 5, 0, 6, 0, "MODEL"),
    ]
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    nodes = [
        {"id": 1, "type": "CheckpointLoaderSimple", "outputs": [{"links": [1]}], "inputs": []},
        {"id": 2, "type": "LoadImage", "outputs": [{"links": [3]}], "inputs": []},
        {"id": 3, "type": "CLIPVisionLoader", "outputs": [{"links": [4]}]},
        {"id": 4, "type": "IPAdapterModelLoader", "outputs": [{"links": [2]}], "pos": [10, 20],
         "widgets_values": ["d.bin"]},
        {"id": 5, "type": "IPAdapterAdvanced", "pos": {"0": 300, "1": 40}, "order": 3, "mode": 0,
         "inputs": [{"name": n, "link": i} for i, n in
                    enumerate(("model", "ipadapter", "image", "clip_vision"), 1)],
         "outputs": [{"links": [5]}],
         "widgets_values": [0.8, "linear", "concat", 0, 1, "V only"]},
        {"id": 6, "type": "KSampler", "inputs": [{"name": "model", "link": 5}], "outputs": []},
    ]  # fmt: skip
    graph = {"nodes": nodes, "last_node_id": 6, "last_link_id": 5, "version": 0.4}
    if subgraph:
        graph["links"] = [dict(zip(names, link, strict=True)) for link in links]
        outer = {"nodes": [], "links": [], "definitions": {"subgraphs": [graph]}}
        return outer
    return {**graph, "links": [[*link] for link in links]}


def test_one_picture_of_two_and_a_word_that_is_no_type():
    style = {"image_style": ["2", 0], "weight_style": 1.2, "weight_composition": 0.7}
    made, _ = convert(api("IPAdapterStyleComposition", **style))
    assert len(of(made, "IPA_Apply")) == 2 and len(of(made, "IPA_EncodeImage")) == 1
    made, _ = convert(api(weight_type="channel penalty"))
    assert len(of(made, "IPA_Apply")) == 1 and not of(made, "IPA_LayerWeights")


def test_a_preset_whose_files_have_another_order_there():
    request = api()
    inputs = {"model": ["1", 0], "preset": "LIGHT - SD1.5 only (low strength)"}
    request["4"] = {"class_type": "IPAdapterUnifiedLoader", "inputs": inputs}
    request["5"]["inputs"]["ipadapter"] = ["4", 1]
    made, report = convert(request)
    assert made == request and "v1.1 of light" in report[0]


@pytest.mark.parametrize("mode", [2, 4])
def test_what_is_muted_takes_nothing_along(mode):
    workflow = editor()
    muted = copy.deepcopy(workflow["nodes"][4]) | {"id": 7, "mode": mode}
    muted["outputs"] = [{"links": None}]
    fed = [(6, 1, 0, 0, "MODEL"), (7, 4, 0, 1, "IPADAPTER"), (8, 2, 0, 2, "IMAGE"),
           (9, 3, 0, 3, "CLIP_VISION")]  # fmt: skip
    for id_, origin, slot, target, type_ in fed:
        workflow["links"].append([id_, origin, slot, 7, target, type_])
        muted["inputs"][target]["link"] = id_
        (output,) = workflow["nodes"][origin - 1]["outputs"]
        output["links"].append(id_)
    workflow["nodes"].insert(4, muted)
    made, _ = convert(workflow)
    modes = {
        kind: [n.get("mode", 0) for n in made["nodes"] if n["type"] == kind]
        for kind in ("IPA_Apply", "IPA_EncodeImage")
    }
    assert modes == {"IPA_Apply": [mode, 0], "IPA_EncodeImage": [mode, 0]}


def test_a_reroute_before_the_adapter():
    workflow = editor()
    workflow["nodes"][3]["outputs"] = [{"links": [6]}]
    workflow["links"] += [[6, 4, 0, 7, 0, "IPADAPTER"]]
    workflow["links"][1] = [2, 7, 0, 5, 1, "IPADAPTER"]
    reroute = {"id": 7, "type": "Reroute", "inputs": [{"name": "", "link": 6}]}
    workflow["nodes"].append({**reroute, "outputs": [{"links": [2]}]})
    made, report = convert(workflow)
    assert "IPA_Apply" in {node["type"] for node in made["nodes"]}
    assert report[-1] == "IPAdapterModelLoader (4): kept, for Reroute."


def test_the_ends_of_a_subgraph():
    """Its inputs know their links, and what it gives out stays."""
    workflow = editor(subgraph=True)
    (graph,) = workflow["definitions"]["subgraphs"]
    graph["nodes"] = [n for n in graph["nodes"] if n["id"] not in (1, 2, 6)]
    graph["inputs"] = [{"name": "model", "linkIds": [1]}, {"name": "image", "linkIds": [3]}]
    graph["outputs"] = [{"name": "model", "linkIds": [5]}, {"name": "adapter", "linkIds": [6]}]
    links = {link["id"]: link for link in graph["links"]}
    links[1] |= {"origin_id": -10, "origin_slot": 0}
    links[3] |= {"origin_id": -10, "origin_slot": 1}
    links[5] |= {"target_id": -20, "target_slot": 0}
    given_out = {"id": 6, "origin_id": 4, "origin_slot": 0, "target_id": -20, "target_slot": 1}
    graph["links"].append({**given_out, "type": "IPADAPTER"})
    graph["nodes"][1]["outputs"][0]["links"].append(6)
    made, report = convert(workflow)
    (graph,) = made["definitions"]["subgraphs"]
    for ends, id_, slot_key, key in (("inputs", -10, "origin_slot", "origin_id"),
                                     ("outputs", -20, "target_slot", "target_id")):  # fmt: skip
        for slot, end in enumerate(graph[ends]):
            there = [x["id"] for x in graph["links"] if x[key] == id_ and x[slot_key] == slot]
            assert end["linkIds"] == there and len(there) == 1, (ends, slot)
    assert report[-1] == "IPAdapterModelLoader (4): kept, for an output of the subgraph."


@pytest.mark.parametrize("subgraph", [False, True])
def test_what_the_editor_saves(subgraph):
    made, report = convert(editor(subgraph))
    graph = made["definitions"]["subgraphs"][0] if subgraph else made
    nodes = {node["id"]: node for node in graph["nodes"]}
    by_type = {node["type"]: node for node in nodes.values()}
    assert by_type.keys() == {
        *("CheckpointLoaderSimple", "LoadImage", "CLIPVisionLoader", "KSampler"),
        *("IPA_LoadAdapter", "IPA_EncodeImage", "IPA_Apply"),
    }
    apply = by_type["IPA_Apply"]
    assert apply["pos"] == [300, 40] and by_type["IPA_LoadAdapter"]["pos"] == [10, 20]
    assert apply["widgets_values"] == [0.8, 0, 1, "concat", 1.0]
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [
        x if isinstance(x, dict) else dict(zip(fields, x, strict=False)) for x in graph["links"]
    ]
    assert len({link["id"] for link in links}) == len(links)
    ends = {(nodes[link["origin_id"]]["type"], nodes[link["target_id"]]["type"]) for link in links}
    assert ends == {
        ("CheckpointLoaderSimple", "IPA_Apply"),
        ("LoadImage", "IPA_EncodeImage"),
        ("CLIPVisionLoader", "IPA_EncodeImage"),
        ("IPA_LoadAdapter", "IPA_Apply"),
        ("IPA_EncodeImage", "IPA_Apply"),
        ("IPA_Apply", "KSampler"),
    }
    for link in links:  # every end knows its links, and no others
        origin, target = nodes[link["origin_id"]], nodes[link["target_id"]]
        assert link["id"] in origin["outputs"][link["origin_slot"]]["links"]
        assert target["inputs"][link["target_slot"]]["link"] == link["id"]
    known = sorted(link["id"] for link in links)
    outputs = [i for n in nodes.values() for o in n["outputs"] for i in o["links"] or []]
    inputs = [i["link"] for n in nodes.values() for i in n.get("inputs", []) if i["link"]]
    assert sorted(outputs) == sorted(inputs) == known
    assert max(nodes) <= graph["last_node_id"] and max(known) <= graph["last_link_id"]
    assert len(report) == 2


@pytest.mark.parametrize("given", [[], {"a": 1}, {"a": {"b": 1}}])
def test_what_is_no_workflow(given):
    with pytest.raises(ValueError, match="workflow of ComfyUI"):
        convert(given)


def test_the_command(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(api()))
    command = [sys.executable, "-m", "tools.convert", str(old), str(new)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "IPAdapterAdvanced (5): Apply IP-Adapter, at 0.8." in done.stdout
    assert json.loads(new.read_text()) == convert(api()).workflow
    old.write_text("{")
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "old.json" in failed.stderr
