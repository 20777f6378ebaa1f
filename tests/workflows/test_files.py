"""What the files promise: both formats, a picture, models to download, a clean layout."""

from __future__ import annotations

import itertools
import re
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import pytest
from PIL import Image

from ip_adapter_core.files import published
from tools.workflows.api import FOLDER, NAMES, PUBLIC, of_class, read

FOLDER_OF = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "vae_name": "vae",
    "clip_name": "clip_vision",
    "adapter_name": "ipadapter",
    "control_net_name": "controlnet",
}
FOUND = {  # what Auto finds with its standard preset
    ("ip-adapter_sd15.safetensors", "ipadapter"),
    ("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "clip_vision"),
}
TITLE_BAR = 30


def test_every_task_and_nothing_else_has_files():
    names = set(NAMES)
    assert {path.stem for path in FOLDER.glob("*.json")} == names
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == names
    assert all(re.fullmatch("[a-z][a-z_]*", name) for name in names)


def test_a_picture_stands_beside_it_where_the_template_browser_looks(workflow):
    path = FOLDER / f"{workflow.name}.jpg"
    assert path.stat().st_size <= 60 * 1024
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height, "the browser cuts or letterboxes other shapes"
        assert len(picture.convert("L").getcolors(256) or range(257)) > 16, "an empty picture"


def test_each_model_file_comes_with_its_download(workflow):
    wanted = {
        (value, FOLDER_OF[name])
        for node in workflow.api.values()
        for name, value in node["inputs"].items()
        if name in FOLDER_OF
    }
    if any(of_class(workflow.api, "IPA_AutoLoad")):
        wanted |= FOUND
    offered = [(model["name"], model["directory"]) for model in workflow.models]
    assert set(offered) == wanted
    assert len(offered) == len(wanted)


def test_files_are_those_that_auto_tells_people_to_get(workflow):
    recommended = {own.name for family in published.ADAPTERS.values() for own in family.values()}
    inputs = [node["inputs"] for node in workflow.api.values()]
    assert {i["adapter_name"] for i in inputs if "adapter_name" in i} <= recommended
    encoder = published.VIT_L if any(of_class(workflow.api, "UNETLoader")) else published.VIT_H
    assert {i["clip_name"] for i in inputs if "clip_name" in i} <= {encoder.name}


def test_downloads_stand_at_the_node_that_names_the_file(workflow):
    for node in workflow.nodes:
        endings = (".safetensors", ".bin")
        files = [value for value in node["widgets_values"] if str(value).endswith(endings)]
        if node["type"] == "IPA_AutoLoad":
            files = [name for name, _ in sorted(FOUND, reverse=True)]
        assert [model["name"] for model in node["properties"].get("models", ())] == files


def test_each_download_is_the_public_one_and_linked_in_a_note(workflow):
    notes = (node for node in workflow.editor["nodes"] if node["type"] == "MarkdownNote")
    text = "\n".join(note["widgets_values"][0] for note in notes)
    for model in workflow.models:
        public = PUBLIC[model["name"]]
        assert model == {"name": public.name, "url": public.url, "directory": public.directory}
        assert f"[{public.name}]({public.url})" in text
        saved_as = PurePosixPath(urlsplit(public.url).path).name
        assert saved_as == public.name or f"saves it as `{saved_as}`" in text


@pytest.mark.parametrize("weights", PUBLIC.values(), ids=lambda weights: weights.name)
def test_downloads_are_of_a_kind_that_the_host_offers(weights):
    """Its list: huggingface.co or civitai.com, and a file ending that holds no code."""
    parts = urlsplit(weights.url)
    assert (parts.scheme, parts.netloc, parts.query) == ("https", "huggingface.co", "")
    assert "/resolve/main/" in parts.path
    # FaceID is published as .bin alone: the host names it and its folder, and offers the address.
    ending = ".bin" if weights == published.FACE_ID else ".safetensors"
    assert weights.name.endswith(ending) and weights.saved_as.endswith(ending)


def test_nodes_name_the_pack_they_come_from(workflow):
    for node in workflow.nodes:
        ours = node["type"].startswith("IPA_")
        assert node["properties"]["cnr_id"] == ("comfyui-ip-adapter" if ours else "comfy-core")
        assert node["properties"]["Node name for S&R"] == node["type"]


def test_nothing_overlaps_and_frames_hold_their_nodes(workflow):
    def box(node):
        (x, y), (width, height) = node["pos"], node["size"]
        return x, y - TITLE_BAR, x + width, y + height

    boxes = [box(node) for node in workflow.editor["nodes"]]
    for (l1, t1, r1, b1), (l2, t2, r2, b2) in itertools.combinations(boxes, 2):
        assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1
    frames = [
        (x, y, x + width, y + height)
        for x, y, width, height in (group["bounding"] for group in workflow.editor["groups"])
    ]
    for left, top, right, bottom in map(box, workflow.nodes):
        assert any(x <= left and y <= top and right <= r and bottom <= b for x, y, r, b in frames)


def test_links_run_forward(workflow):
    left = {node["id"]: node["pos"][0] for node in workflow.editor["nodes"]}
    for _, source, _, target, _, _ in workflow.editor["links"]:
        assert left[source] <= left[target]


def test_settings_are_the_papers_or_the_hosts_own_of_flux(workflow):
    flux = any(of_class(workflow.api, "UNETLoader"))
    wanted = ("euler", "simple", 20, 1.0) if flux else ("ddim", "ddim_uniform", 50, 7.5)
    for inputs in of_class(workflow.api, "KSampler"):
        given = (inputs[name] for name in ("sampler_name", "scheduler", "steps", "cfg"))
        assert tuple(given) == wanted
    texts = {inputs["text"] for inputs in of_class(workflow.api, "CLIPTextEncode")}
    apply = "IPA_Apply", "IPA_ApplyConditioning", "IPA_ApplyRegions"
    weights = {
        inputs["weight"]
        for inputs in of_class(workflow.api, *apply)
        if isinstance(inputs["weight"], float)
    }
    if weights:  # not a list of them
        assert weights == {1.0} if texts == {""} else max(weights) < 1


def test_every_workflow_of_faces_tells_where_the_face_encoder_goes(workflow):
    """It is a folder, which the list of downloads cannot hold."""
    (about, _) = (n for n in workflow.editor["nodes"] if n["type"] == "MarkdownNote")
    for inputs in of_class(workflow.api, "IPA_LoadFaceEncoder"):
        place = f"models/insightface/models/{inputs['encoder_name']}"
        assert f"`{place}`" in about["widgets_values"][0]


def test_per_latent_has_one_latent_for_each_picture():
    api = read("several_images_per_latent")
    (latent,) = of_class(api, "EmptyLatentImage")
    assert latent["batch_size"] == len([*of_class(api, "LoadImage")])
