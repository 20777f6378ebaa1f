"""Releases: the registry's archive (.comfyignore) holds all that the nodes need; one version."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from tools.comfyui.install import ROOT

CODE = """
import asyncio, importlib.util, sys
from tools.comfyui import install
install.boot(install.require())
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "archive", f"{folder}/__init__.py", submodule_search_locations=[folder])
module = sys.modules["archive"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
extension = asyncio.run(module.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
print(len(nodes), len({node.GET_SCHEMA().node_id for node in nodes}))
"""


@pytest.fixture(scope="module")
def archived() -> list[str]:
    def listed(*options: str) -> set[str]:
        command = ["git", "ls-files", "-z", "--cached", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip("not a git checkout")
        return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}

    return sorted(listed() - listed("--ignored", "--exclude-from=.comfyignore"))


def test_only_what_the_nodes_need_and_small(archived):
    top = {name.split("/")[0] for name in archived}
    wanted = {"nodes", "ip_adapter_core", "web", "locales", "workflows", "subgraphs"}
    files = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"}
    assert wanted | files <= top
    assert {name for name in top - wanted if "." not in name} == {"LICENSE"}
    assert sum((ROOT / name).stat().st_size for name in archived) < 3 * 2**20


@pytest.mark.nightly
def test_nodes_load_from_it_alone(archived, host_path, tmp_path):
    for name in archived:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    listed = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert done.stdout.split()[-2:] == [str(len(listed))] * 2


def test_one_version_is_stated_everywhere():
    stated = {
        "pyproject.toml": r'^version = "([^"]+)"',
        "CITATION.cff": r"^version: (\S+)",
        "CHANGELOG.md": r"^## \[([^\]]+)\]",  # the first is the newest
    }
    found = {
        name: re.search(pattern, (ROOT / name).read_text("utf-8"), re.MULTILINE)
        for name, pattern in stated.items()
    }
    assert len({match and match[1] for match in found.values()}) == 1, found
