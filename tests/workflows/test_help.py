"""The pages of the host's help panel: whole, in step with the nodes, and served."""

from __future__ import annotations

import json
import re
from urllib import error, request

import pytest

from tools.build_help import DOCS, PICTURES, PROSE, build, pictures
from tools.build_texts import PREFIX
from tools.build_workflows import WORKFLOWS

PAGES = sorted(path.stem for path in PROSE.glob("*.md"))
IN_NO_WORKFLOW = {"IPA_LoadImageEncoder", "IPA_LoadPrompt"}
"""Their pages show the picture of a workflow that they can be put into."""


def read(name: str) -> str:
    return (DOCS / f"{name}.md").read_text("utf-8")


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The cells behind the name of each row of the table under that heading."""
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", row)[1:-1] for row in re.findall(r"^\|.*\|$", section, re.M)]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows[2:]}


def test_pages_are_what_the_prose_and_the_nodes_give(object_info):
    made = build(object_info)
    assert sorted(path.name for path in DOCS.glob("*.md")) == sorted(made)
    for path, text in made.items():
        assert (DOCS / path).read_text("utf-8") == text, (
            f"web/docs/{path} is out of step: run `python -m tools.build_help`"
        )


def test_every_node_has_a_page(object_info):
    assert sorted(name for name in object_info if name.startswith(PREFIX)) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_every_input_and_output_and_says_what_it_is(name, object_info):
    page, node = read(name), object_info[name]
    assert page.startswith(f"# {node['display_name']}\n")
    inputs = [
        f"`{key}`" for kind in ("required", "optional") for key in node["input"].get(kind, {})
    ]
    assert list(table(page, "Inputs")) == inputs
    assert list(table(page, "Outputs")) == [f"`{key}`" for key in node["output_name"]]
    for heading in ("Inputs", "Outputs"):
        assert all(all(cells) and len(cells) == 2 for cells in table(page, heading).values())


def test_a_page_tells_ranges_choices_and_defaults():
    weight, crop = table(read("IPA_Apply"), "Inputs")["`weight`"][0], read("IPA_EncodeImage")
    assert weight == "FLOAT, -5 to 5, default 1"
    assert table(crop, "Inputs")["`crop`"][0] == "one of `center` (default), `pad`, `none`"
    assert table(crop, "Inputs")["`negative_image`"][0] == "IMAGE, optional"


def test_no_page_lists_the_files_of_a_machine(object_info):
    for name, key in (("IPA_LoadAdapter", "adapter_name"), ("IPA_LoadPrompt", "prompt_name")):
        assert table(read(name), "Inputs")[f"`{key}`"][0] == "a file from the list"
    for file in object_info["IPA_LoadImageEncoder"]["input"]["required"]["encoder_name"][1][
        "options"
    ]:
        assert file not in read("IPA_LoadImageEncoder")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_and_names_a_workflow_with_the_node(name, reading):
    page = read(name)
    (shown,) = re.findall(rf"^!\[[^]]+\]\({PICTURES}/(\w+)\.jpg\)$", page, re.M)
    assert f"**{shown}**" in page
    nodes = {node["class_type"] for node in reading(shown).api.values()}
    assert (name in nodes) != (name in IN_NO_WORKFLOW)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_left_of_the_placeholders(name):
    assert not re.search(r"[{}]", read(name))


def test_pictures_are_the_workflows_own():
    folder = DOCS / PICTURES
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in pictures()]
    for path in folder.iterdir():
        assert path.read_bytes() == (WORKFLOWS / path.name).read_bytes(), (
            f"{path.name} is out of step: run `python -m tools.build_help`"
        )


def test_the_host_serves_pages_and_pictures_where_the_panel_looks(client, object_info):
    """The panel takes the pack's name out of `python_module`. It asks for a page in the user's
    language first, and must get nothing there."""
    direct = request.build_opener(request.ProxyHandler({}))
    base = f"http://{client.address}/extensions"
    for name in PAGES:
        folder, pack = object_info[name]["python_module"].split(".")
        assert folder == "custom_nodes"
        with pytest.raises(error.HTTPError, match="404"):
            direct.open(f"{base}/{pack}/docs/{name}/en.md")
        with direct.open(f"{base}/{pack}/docs/{name}.md") as answer:
            assert "html" not in answer.headers["Content-Type"]  # the panel would not show it
            assert answer.read().decode("utf-8") == read(name)
    for path in (DOCS / PICTURES).iterdir():
        with direct.open(f"{base}/{pack}/docs/{PICTURES}/{path.name}") as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"
            assert answer.read() == path.read_bytes()


def test_the_folder_adds_no_script_to_the_editor(client):
    direct = request.build_opener(request.ProxyHandler({}))
    with direct.open(f"http://{client.address}/extensions") as answer:
        scripts = json.load(answer)
    assert scripts and not [path for path in scripts if "ip_adapter" in path]
