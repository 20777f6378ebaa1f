"""The whole recipe by its one command, on small drawings, killed in its stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.drawings import packages_of_drawings
from tools.comfyui.install import ROOT
from training.recipes.emoji.__main__ import ADAPTERS, STEPS, Recipe

pytest.importorskip("resvg_py", reason="`pip install resvg-py`")
FEW = {
    "taught": 12,
    "references of a drawing": 2,
    "autoencoder": [6],
    "image encoder": 3,
    "judge of hands": 3,
    "judge of subjects": 3,
    "base": [3, 3],
    "plain": 12,
    "style": 12,
    "plus": 12,
    "references": 1,
}


def files(work):
    """Every part's file, or the files of its folder, and what the report says but for times."""
    report = json.loads((work / "report.json").read_text())
    del report["seconds"]
    found = {"report": json.dumps(report).encode()}
    recipe = Recipe(0, work, {**STEPS, **FEW}, "cpu", work)
    for _, target, _ in recipe.parts():
        paths = [work / target, *(work / target).rglob("*")] if target != "report.json" else []
        found |= {
            str(p.relative_to(work)): p.read_bytes()
            for p in paths
            if p.is_file() and p.suffix != ".tmp"
        }
    sheets = ("samples.png", "transfer.png")
    return found | {name: (work / name).read_bytes() for name in sheets}


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups to kill")
def test_killed_in_its_stages_it_ends_with_the_same_files(tmp_path):
    """In all that take a second; adapters after their first checkpoint, which they go on from."""
    packages = packages_of_drawings(tmp_path / "packages")

    def start(name):
        command = [sys.executable, "-m", "training.recipes.emoji", "--work", tmp_path / name]
        command += ["--packages", packages, "--steps", json.dumps(FEW), "--mixed_precision", "no"]
        log = (tmp_path / f"{name}.log").open("ab")
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            stderr=log,
            stdout=log,
            start_new_session=True,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )

    assert start("whole").wait() == 0
    stages = [part[0] for part in Recipe(0, tmp_path, {**STEPS, **FEW}, "cpu", packages).parts()]
    seconds = json.loads((tmp_path / "whole" / "times.json").read_text())["seconds"]
    log, work, killed = tmp_path / "killed.log", tmp_path / "killed", []
    for stage in (stage for stage in stages if seconds[stage]):  # others are over before a kill
        said = log.stat().st_size if log.exists() else 0
        process = start("killed")

        def under_way(stage=stage, said=said):
            begun = f"{stage} …\n" in log.read_bytes()[said:].decode("utf-8", "ignore")
            saved = (work / f"run-{stage}" / "checkpoints").glob("step-*[0-9]")
            return begun and (stage not in ADAPTERS or any(saved))

        while process.poll() is None and not under_way():
            time.sleep(0.02)
        time.sleep(0 if stage in ADAPTERS else 0.4 * seconds[stage])
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed.append(stage)
        process.wait()
    assert {*killed} >= {"base 1", "base 2", *ADAPTERS, "report"}
    assert start("killed").wait() == 0
    assert log.read_text(encoding="utf-8").count("going on after step") == len(ADAPTERS)
    whole, again = files(tmp_path / "whole"), files(work)
    assert whole.keys() == again.keys()
    assert not [name for name in whole if whole[name] != again[name]]
