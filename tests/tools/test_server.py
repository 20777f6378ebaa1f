"""The server and its client: what a prompt does, and what a bad one is told."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import ANY

import pytest
from PIL import Image

from tools.comfyui.client import Progress, PromptError, PromptInterrupted
from tools.comfyui.server import WATCHED, Server, ServerError
from tools.workflows.api import read, smaller

Prompt = dict[str, dict]
STEPS = 250
SAMPLER = next(i for i, n in read("text_and_image").items() if n["class_type"] == "KSampler")


@pytest.fixture
def inverted() -> Prompt:
    """Return a prompt without models: an image, inverted and saved."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "reference.png"}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }


@pytest.fixture
def fresh(models) -> Iterator[str]:
    """Name an image that no prompt has loaded: the server still remembers the others'."""
    picture = models / "input" / f"{uuid.uuid4().hex}.png"
    shutil.copy(models / "input" / "reference.png", picture)
    yield picture.name
    picture.unlink()


@pytest.fixture
def sampled() -> Prompt:
    """Return a workflow without its adapter, of so many steps that one can stop it on the way."""
    made = smaller(read("text_and_image"), STEPS, side=64)
    clip = made[made[SAMPLER]["inputs"]["positive"][0]]["inputs"]["clip"]
    made[SAMPLER]["inputs"] |= {"cfg": 1.0, "model": [clip[0], 0]}
    return made


def test_the_pack_is_loaded(server):
    assert "IPA_Apply" in server.object_info("IPA_Apply")


def test_pictures_come_back_and_unchanged_nodes_are_cached(server, inverted, fresh):
    inverted["1"]["inputs"]["image"] = fresh
    inverted["3"]["inputs"]["filename_prefix"] = "first"
    first = server.run(inverted)
    assert first.executed == ["1", "2", "3"]
    with Image.open(io.BytesIO(first.images["3"][0])) as picture:
        assert picture.size == (512, 512)
    inverted["3"]["inputs"]["filename_prefix"] = "second"
    second = server.run(inverted)
    assert set(second.cached) == {"1", "2"}
    assert second.executed == ["3"]


def test_progress_is_reported_and_an_interrupt_ends_the_prompt(server, sampled):
    seen = []

    def stop(progress):  # the server reports some steps only, as many as a person can follow
        if not seen:
            server.interrupt()
        seen.append(progress)

    with pytest.raises(PromptInterrupted) as raised:
        server.run(sampled, stop)
    assert raised.value.node_id == SAMPLER
    assert {(progress.node, progress.total) for progress in seen} == {(SAMPLER, STEPS)}
    assert 1 <= seen[0].step <= seen[-1].step < STEPS
    sampled[SAMPLER]["inputs"]["steps"] = 8
    again = server.run(sampled, seen.append)
    assert seen[-1] == Progress(SAMPLER, 8, 8)
    (images,) = again.images.values()
    assert images
    server.free()


def change(node, **changes):
    return lambda prompt: prompt[node].update(changes)


@pytest.mark.parametrize(
    "break_, said, node, kind",
    [
        (change("2", class_type="NoSuchNode"), "NoSuchNode", ("2", ANY), ANY),
        (
            change("1", inputs={"image": "no-such-picture.png"}),
            "no-such-picture",
            ("1", "LoadImage"),
            "custom_validation_failed",
        ),
        (dict.clear, "no outputs", ANY, ANY),
        (
            change("1", inputs={"image": "broken.png"}),
            r"^node 1 \(LoadImage\): ",
            ("1", "LoadImage"),
            "PIL.UnidentifiedImageError",
        ),
    ],
    ids=["unknown node", "invalid value", "nothing to do", "a node that raises"],
)
def test_a_bad_prompt_is_refused_and_the_server_goes_on(
    server, models, inverted, break_, said, node, kind
):
    given = copy.deepcopy(inverted)
    break_(given)
    broken = models / "input" / "broken.png"
    broken.write_bytes(b"no picture")
    try:
        with pytest.raises(PromptError, match=said) as raised:
            server.run(given)
    finally:
        broken.unlink()
    error = raised.value
    assert (error.node_id, error.node_class) == node
    assert error.exception_type == kind
    assert server.run(inverted).images["3"]


def test_a_server_that_ends_at_once_shows_its_log(tmp_path: Path):
    (tmp_path / "main.py").write_text("print('no such luck'); raise SystemExit(3)")
    server = Server(tmp_path / "base", tmp_path)
    with pytest.raises(ServerError, match=r"(?s)exit code 3.*no such luck"), server:
        pass


def test_a_server_that_never_answers_is_stopped(tmp_path: Path):
    (tmp_path / "main.py").write_text("import time; time.sleep(60)")
    server = Server(tmp_path / "base", tmp_path, start_timeout=2)
    with pytest.raises(ServerError, match="within 2 s"), server:
        pass
    assert server.process is None


def test_the_server_ends_with_its_parent(tmp_path: Path):
    script = tmp_path / "main.py"
    script.write_text("import time; print('up', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()  # what the system does when the parent is gone
    assert process.wait(10) == 1
