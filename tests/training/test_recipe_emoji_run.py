"""The whole recipe by its one command, on drawings of this file, killed in every stage."""

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
from training.recipes.emoji.__main__ import STEPS, Recipe

pytest.importorskip("resvg_py", reason="`pip install resvg-py`")
FEW = {
    "taught": 12,
    "references of a drawing": 2,
    "autoencoder": [6],
    "image encoder": 3,
    "judge of hands": 3,
    "judge of subjects": 3,
    "base": [3, 3],
    "plain": 3,
    "style": 3,
    "plus": 3,
    "references": 2,
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
def test_killed_in_every_stage_it_ends_with_the_same_files(tmp_path):
    packages = packages_of_drawings(tmp_path / "packages")

    def start(name):
        command = [sys.executable, "-m", "training.recipes.emoji", "--work", tmp_path / name]
        command += ["--packages", packages, "--steps", json.dumps(FEW), "--mixed_precision", "no"]
        log = (tmp_path / f"{name}.log").open("a")
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stderr=log, stdout=log, start_new_session=True
        )

    assert start("whole").wait() == 0
    stages = [part[0] for part in Recipe(0, tmp_path, {**STEPS, **FEW}, "cpu", packages).parts()]
    seconds = json.loads((tmp_path / "whole" / "times.json").read_text())["seconds"]
    log, killed = tmp_path / "killed.log", []
    for stage in stages:
        process = start("killed")
        begun = f"\n{stage} …\n"
        while begun not in "\n" + log.read_text() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.4 * seconds[stage])
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed.append(stage)
        process.wait()
    assert len(killed) > len(stages) - 3, f"only {killed} were killed"
    assert start("killed").wait() == 0
    whole, again = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert whole.keys() == again.keys()
    assert not [name for name in whole if whole[name] != again[name]]
