"""The host's editor in a headless browser: how people meet the pack there, and the workflows."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tools.comfyui.browser import COMPLAINTS
from tools.comfyui.install import ROOT
from tools.workflows.api import FOLDER, NAMES, SD15
from tools.workflows.export import LEAST

pytestmark = pytest.mark.browser
nightly = pytest.mark.nightly

NODES = sorted(json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8")))
WORDS = {  # what people type: the node that they mean
    "ip adapter": "Apply IP-Adapter",
    "ipadapter": "Apply IP-Adapter",
    "unified loader": "Load IP-Adapter (Auto)",
    "image prompt": "Encode Image Prompt",
    "style transfer": "Layer Weights",
    "reference": "Apply IP-Adapter",
    "heat map": "Image Attention Map",
    "xy plot": "Draw Grid",
    "tiles": "Prepare Image for Prompt",
    "combine embeds": "Combine Image Prompts",
    "regional image prompt": "Apply IP-Adapter (Conditioning)",
    "weights per frame": "Weights per Latent",
}
CARDS = """() => [...document.querySelectorAll('[role=dialog] img')]
    .filter((picture) => picture.naturalWidth >= 256)
    .map((picture) => {
        let card = picture
        while (card && !/^[a-z]+(_[a-z]+)*$/m.test(card.innerText ?? '')) card = card.parentElement
        return card?.innerText.match(/^[a-z]+(_[a-z]+)*$/m)?.[0]
    })"""
"""Names of the templates whose picture is there."""
FOUND = """() => [...document.querySelectorAll('#results-list [role=option]')].map(
    (entry) => entry.innerText.split('\\n')[0])"""


SHRINK = """() => {
    const values = {
        EmptyLatentImage: {width: 64, height: 64},
        EmptySD3LatentImage: {width: 64, height: 64},
        KSampler: {steps: 1},
        IPA_LayerWeights: {preset: "ease out"},  // the stand-ins have other blocks
    }
    for (const node of app.graph._nodes)
        for (const [name, value] of Object.entries(values[node.type] ?? {}))
            node.widgets.find((widget) => widget.name === name).value = value
}"""
SHOWN = """() => {
    const [saved] = app.graph._nodes.filter((node) => node.type === 'SaveImage')
    const [image] = saved.imgs ?? []
    return image?.naturalWidth ? [image.naturalWidth, image.naturalHeight] : null
}"""
FACES = """() => app.graph._nodes.filter((node) => node.type === 'IPA_EncodeFace').map(
    (node) => [node.imgs?.map((image) => image.naturalWidth), [...node.size]])"""
"""What these nodes show, and their sizes, which grow where there is no room for it."""


@pytest.fixture
def bare(page):
    """Return the editor with an empty graph and nothing open over it."""
    for _ in range(3):
        page.keyboard.press("Escape")
    page.evaluate("() => app.graph.clear()")
    page.wait_for_function("() => !document.querySelector('[role=dialog], #results-list')")
    return page


@nightly
@pytest.mark.parametrize("words", WORDS)
def test_the_search_box_finds_nodes_by_what_people_type(bare, words):
    box = bare.get_by_role("combobox", name="Add a node...")
    for _ in range(5):  # the canvas may still be busy
        bare.mouse.dblclick(900, 400)
        bare.wait_for_timeout(500)
        if box.is_visible():
            break
    box.fill(words)
    entry = bare.locator("#results-list [role=option]", has_text=WORDS[words]).first
    entry.wait_for(state="attached", timeout=10_000)
    assert WORDS[words] in bare.evaluate(FOUND)


@nightly
@pytest.mark.parametrize("name", NODES)
def test_the_help_panel_shows_the_page(bare, name):
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text("utf-8")
    bare.evaluate(
        """(type) => {
            const node = LiteGraph.createNode(type)
            app.graph.add(node)
            app.canvas.centerOnNode(node)
            app.canvas.selectNode(node)
        }""",
        name,
    )
    bare.get_by_role("button", name="Node Info").click()
    title = re.search(r"^# (.+)$", page, re.M)
    assert title is not None
    bare.get_by_role("heading", name=title[1], exact=True).first.wait_for(timeout=10_000)
    pictures = bare.locator(".node-help-content img")
    for place in range(pictures.count()):
        assert pictures.nth(place).evaluate("async (img) => { await img.decode(); return true }")


@nightly
def test_the_template_browser_shows_every_workflow_with_its_picture(bare):
    bare.get_by_role("button", name="Templates").click()
    bare.get_by_role("dialog").get_by_text("ip_adapter").first.click()
    wanted = set(NAMES)
    seen = set()
    bare.mouse.move(900, 500)
    bare.wait_for_function(f"() => ({CARDS})().length >= 4", timeout=20_000)
    for turn in range(80):  # cards are made, and their pictures fetched, as one scrolls
        seen |= wanted & set(bare.evaluate(CARDS))
        if seen == wanted:
            break
        bare.mouse.wheel(0, 250 if turn % 40 < 20 else -250)
        bare.wait_for_timeout(400)
    assert seen == wanted


def open_template(page, name):
    """All of its nodes and models are there, and no complaints."""
    page.get_by_role("button", name="Templates").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("ip_adapter").first.click()
    dialog.get_by_placeholder(re.compile("Search")).fill(name)
    dialog.get_by_text(name, exact=True).first.click()
    nodes = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["nodes"]
    page.wait_for_function(
        "(count) => app.graph._nodes.length === count", arg=len(nodes), timeout=20_000
    )
    page.wait_for_timeout(500)  # a warning would come after the graph
    assert page.evaluate(
        "() => app.graph._nodes.every((node) => !node.has_errors && node.constructor?.nodeData"
        " || node.type === 'MarkdownNote')"
    )
    assert page.evaluate(COMPLAINTS) == []


@nightly
@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_from_the_browser(bare, name):
    open_template(bare, name)


@pytest.mark.xdist_group("_started")  # by day, not worth a server for itself
@pytest.mark.parametrize("name, faces", [
    ("text_and_image", 0),
    ("face_id", 1),
    pytest.param("face_and_style", 1, marks=nightly),
    pytest.param("two_faces", 2, marks=nightly),
    pytest.param("flux", 0, marks=nightly),
    pytest.param("flux_regions", 0, marks=nightly),
])  # fmt: skip
def test_a_template_runs_and_shows_its_image_and_faces(bare, name, faces):
    open_template(bare, name)
    bare.evaluate(SHRINK)
    bare.evaluate("() => { app.queuePrompt(0) }")
    bare.wait_for_function(f"() => ({SHOWN})() || ({COMPLAINTS})().length", timeout=120_000)
    assert bare.evaluate(COMPLAINTS) == []
    assert bare.evaluate(SHOWN) == [64, 64]
    assert bare.evaluate(FACES) == [[[256], list(LEAST["IPA_EncodeFace"])]] * faces


@nightly
def test_a_wrong_adapter_is_told_with_its_remedy(bare):
    """An SDXL adapter on an SD1.5 model: the editor shows what the node says."""
    workflow = json.loads((FOLDER / "text_and_image.json").read_text("utf-8"))
    (loader,) = (node for node in workflow["nodes"] if node["type"] == "IPA_LoadAdapter")
    loader["widgets_values"] = ["ip-adapter_sdxl.safetensors"]
    bare.evaluate("async (workflow) => { await app.loadGraphData(workflow) }", workflow)
    bare.evaluate("() => { app.queuePrompt(0) }")
    bare.get_by_text("Apply IP-Adapter failed").first.wait_for(timeout=120_000)
    bare.get_by_role("button", name="View details").first.click()
    for words in ("was made for", "Connect a model of the adapter's family"):
        bare.get_by_text(words).first.wait_for(timeout=10_000)


LOAD = """async (workflow) => {
    await app.loadGraphData(workflow)
    const nodes = app.graph._nodes.map(
        (node) => ({type: node.type, size: [...node.size], least: [...node.computeSize()]}))
    return {api: (await app.graphToPrompt()).output, nodes}
}"""


@nightly
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


@nightly
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_one_node_that_does_the_task(page, client, name):
    entries = client.get("/global_subgraphs").items()
    (id_,) = (id_ for id_, x in entries if (x["name"], x["source"]) == (name, "custom_node"))
    blueprint = json.loads(client.get(f"/global_subgraphs/{id_}")["data"])
    given = {"blueprint": blueprint, "checkpoint": SD15.name}
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
