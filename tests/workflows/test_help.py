"""The pages of the host's help panel: whole, in step with the nodes, and served."""

from __future__ import annotations

import re
from urllib import error

import pytest

from tools.docs.help import DOCS, IMAGES, PAGES, build
from tools.generated import ours, out_of_step
from tools.workflows import api

NAMES = sorted(path.stem for path in PAGES.glob("*.md"))
IN_NO_WORKFLOW = {"IPA_LoadImageEncoder"}
"""Its page shows the picture of a workflow that it can be put into."""


def read(name):
    return (DOCS / f"{name}.md").read_text("utf-8")


def table(page, heading):
    """Type and meaning by the name, of each row of the table under that heading."""
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| \*(.+?)\*<br>(.+) \|$", section, re.M)
    assert len(rows) == section.count("\n| `"), "a row is of another form"
    return {name: (what, meaning) for name, what, meaning in rows}


def test_pages_and_images_are_what_the_prose_the_nodes_and_the_workflows_give(object_info):
    files = build(object_info)
    assert out_of_step(files) == [], "run `python -m tools.docs.help`"
    assert {path for path in DOCS.rglob("*") if path.is_file()} == set(files)


def test_every_node_has_a_page(object_info):
    assert list(ours(object_info)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_page_names_all_that_its_node_has_and_shows_a_workflow_with_it(object_info, name):
    page, node = read(name), object_info[name]
    assert page.startswith(f"# {node['display_name']}\n")
    inputs = [*node["input"].get("required", {}), *node["input"].get("optional", {})]
    assert list(table(page, "Inputs")) == inputs
    assert list(table(page, "Outputs")) == node["output_name"]
    assert re.search(r"^## When it fails\n\n\S", page, re.M)
    assert not re.search(r"[{}]", page), "a placeholder is left"
    (shown,) = re.findall(rf"^!\[[^]]+\]\({IMAGES}/(\w+)\.jpg\)$", page, re.M)
    assert f"**{shown}**" in page
    nodes = {node["class_type"] for node in api.read(shown).values()}
    assert (name in nodes) != (name in IN_NO_WORKFLOW)


def test_a_page_tells_ranges_choices_and_defaults():
    apply, encode = (table(read(name), "Inputs") for name in ("IPA_Apply", "IPA_EncodeImage"))
    assert apply["weight"][0] == "FLOAT, -5 to 5, default 1"
    assert apply["combine"][0] == "one of `concat` (default), `average`, `per_latent`"
    assert encode["negative_image"][0] == "IMAGE, optional"
    assert encode["crop"][0] == "a choice, default `center`"
    assert re.findall("<br>`(.+?)`:", encode["crop"][1]) == ["center", "pad", "none"]


def test_no_page_lists_the_files_of_a_machine(object_info):
    for name, key in (("IPA_LoadAdapter", "adapter_name"), ("IPA_LoadPrompt", "prompt_name")):
        assert table(read(name), "Inputs")[key][0] == "a file from the list"
    required = object_info["IPA_LoadImageEncoder"]["input"]["required"]
    for file in required["encoder_name"][1]["options"]:
        assert file not in read("IPA_LoadImageEncoder")


def test_the_host_serves_pages_and_pictures_where_the_panel_looks(opened, object_info):
    """The panel takes the pack's name out of `python_module`.

    It asks for a page in the user's language first, and must get nothing there.
    """
    for name in NAMES:
        folder, pack = object_info[name]["python_module"].split(".")
        assert folder == "custom_nodes"
        docs = f"/extensions/{pack}/docs"
        with pytest.raises(error.HTTPError, match="404"):
            opened(f"{docs}/{name}/en.md")
        with opened(f"{docs}/{name}.md") as answer:
            assert "html" not in answer.headers["Content-Type"]  # the panel would not show it
            assert answer.read().decode("utf-8") == read(name)
    for path in (DOCS / IMAGES).iterdir():
        with opened(f"{docs}/{IMAGES}/{path.name}") as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"
            assert answer.read() == path.read_bytes()


def test_the_folder_adds_one_script_to_the_editor(client):
    """Settings and a menu entry; pages and pictures are none."""
    names = [path.rpartition("/")[2] for path in client.get("/extensions")]
    assert names.count("ipadapter_plus.js") == 1
    assert not [name for name in names if name.startswith("IPA")]
