"""The workflows in the host's own editor, in a headless browser."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tools.workflows import api

pytestmark = [pytest.mark.browser, pytest.mark.nightly]

LOAD = """async (workflow) => {
    await app.loadGraphData(workflow)
    const nodes = app.graph._nodes.map(
        (node) => ({type: node.type, size: [...node.size], least: [...node.computeSize()]}))
    return {api: (await app.graphToPrompt()).output, nodes}
}"""


def test_the_editor_sends_what_lies_in_api_and_no_node_is_smaller_than_its_contents(page, workflow):
    loaded = page.evaluate(LOAD, workflow.editor)
    assert loaded["api"] == workflow.api
    for node in loaded["nodes"]:
        assert node["size"][0] >= node["least"][0] and node["size"][1] >= node["least"][1], node


# Loads a blueprint, connects a checkpoint and a picture, and gives what would be sent.
CONNECT = """async ({blueprint, checkpoint: name}) => {
    await app.loadGraphData(blueprint)
    const [task] = app.graph._nodes
    const add = (type, values) => {
        const node = LiteGraph.createNode(type)
        app.graph.add(node)
        for (const [name, value] of Object.entries(values))
            node.widgets.find((widget) => widget.name === name).value = value
        return node
    }
    const from = (node, name) => node.outputs.findIndex((output) => output.name === name)
    const to = (name) => task.inputs.findIndex((input) => input.name === name)
    const checkpoint = add("CheckpointLoaderSimple", {ckpt_name: name})
    const picture = add("LoadImage", {image: "reference.png"})
    const encode = add("CLIPTextEncode", {text: ""})
    const latent = add("EmptyLatentImage", {width: 64, height: 64})
    const sampler = add("KSampler", {steps: 1, cfg: 2.0, sampler_name: "ddim", seed: 1})
    const save = add("SaveLatent", {filename_prefix: "blueprint"})
    checkpoint.connect(from(checkpoint, "MODEL"), task, to("model"))
    picture.connect(0, task, to("image"))
    checkpoint.connect(from(checkpoint, "CLIP"), encode, 0)
    task.connect(0, sampler, 0)
    encode.connect(0, sampler, 1)
    encode.connect(0, sampler, 2)
    latent.connect(0, sampler, 3)
    sampler.connect(0, save, 0)
    const shown = task.widgets.map((widget) => [widget.name, widget.value])
    return {api: (await app.graphToPrompt()).output, shown}
}"""
BLUEPRINTS = {  # what the one node shows
    "Image Prompt": {"adapter_preset": "standard", "weight": 0.6, "start_at": 0, "end_at": 1},
    "Style Transfer": {"adapter_preset": "standard", "style_preset": "style", "weight": 1},
}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_one_node_that_does_the_task(page, client, name):
    entries = client.get("/global_subgraphs").items()
    (id_,) = (id_ for id_, x in entries if (x["name"], x["source"]) == (name, "custom_node"))
    blueprint = json.loads(client.get(f"/global_subgraphs/{id_}")["data"])
    given = {"blueprint": blueprint, "checkpoint": api.SD15.name}
    found = page.evaluate(CONNECT, given)
    assert dict(found["shown"]) == BLUEPRINTS[name]
    sent = found["api"]
    kinds = {node["class_type"]: node["inputs"] for node in sent.values()}
    assert kinds["IPA_AutoLoad"]["preset"] == "standard"
    assert kinds["IPA_Apply"]["weight"] == BLUEPRINTS[name]["weight"]
    if name == "Style Transfer":
        assert kinds["IPA_LayerWeights"]["preset"] == "style"
        kinds["IPA_LayerWeights"]["preset"] = "ease in"  # the stand-ins have other blocks
    with ThreadPoolExecutor(1) as aside:  # playwright's own loop runs in this thread
        result = aside.submit(client.run, sent).result()
    classes = {sent[id_]["class_type"] for id_ in (*result.executed, *result.cached)}
    assert {"IPA_AutoLoad", "IPA_EncodeImage", "IPA_Apply", "KSampler"} <= classes
