"""Nothing is drawn twice or lost, and the results are the same, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as changed
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training.errors import TrainingError
from training.evaluate import Evaluation, evaluate

PICTURES, SAMPLES = 5, 2  # conftest.py's


def lines(out):
    return [line for path in sorted(Path(out).glob("*.jsonl")) for line in path.open()]


def agree(found, expected):
    """Of two results, everything: text exactly, numbers to 1e-6, since what the mathematics library
    does with the last block may hang on what the process did before."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            agree(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            agree(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6)
    else:
        assert found == expected


@pytest.mark.nightly
def test_killed_and_resumed(start, straight, tmp_path):
    """Killed at whatever it is doing, the command goes on to the same results."""
    process = start(tmp_path)
    while process.poll() is None and len(lines(tmp_path)) < 20:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert 20 <= len(lines(tmp_path)) < 2 * 3 * PICTURES * SAMPLES
    assert start(tmp_path).wait() == 0
    agree(json.loads((tmp_path / "results.json").read_bytes()), json.loads(straight))


@pytest.mark.parametrize("torn", [1, 30, 200])
def test_torn_in_the_middle_of_a_line(settings, straight, torn, monkeypatch):
    """At any byte; what is there is kept, and nothing is glued to the rest of a line."""
    whole = evaluate(settings)
    path = Path(settings.output_dir, "scores-00000.jsonl")
    path.write_bytes(path.read_bytes()[:-torn])
    agree(evaluate(settings), whole)
    assert all(json.loads(line) for line in lines(settings.output_dir))


def test_damaged_lines_are_measured_again(settings, caplog):
    whole = evaluate(settings)
    path = Path(settings.output_dir, "scores-00000.jsonl")
    content = path.read_bytes().split(b"\n")
    content[3] = b"\0" * 40
    content[9] = b'{"row": 1}'
    path.write_bytes(b"\n".join(content))
    agree(evaluate(settings), whole)
    assert "2 damaged lines" in caplog.text


@pytest.mark.nightly
def test_two_processes_measure_what_one_measures(start, straight, tmp_path):
    assert start(tmp_path, processes=2).wait() == 0
    agree(json.loads((tmp_path / "results.json").read_bytes()), json.loads(straight))
    parts = [path.read_text().count("\n") for path in sorted(tmp_path.glob("*.jsonl"))]
    assert len(parts) == 2 and min(parts) >= 2 * 3 * SAMPLES, "the work was not divided"
    assert sum(parts) == 2 * 3 * PICTURES * SAMPLES
    (tmp_path / "scores-00000.jsonl").unlink()  # one process does what is then lacking
    assert start(tmp_path).wait() == 0
    agree(json.loads((tmp_path / "results.json").read_bytes()), json.loads(straight))


def test_the_first_process_waits_for_slower_ones(settings, monkeypatch):
    both_have_read, go, left = threading.Barrier(2), threading.Event(), []

    def process(number):
        state = SimpleNamespace(
            device=torch.device("cpu"),
            process_index=number,
            num_processes=2,
            is_main_process=number == 0,
            wait_for_everyone=lambda: both_have_read.wait(60),
            destroy_process_group=lambda: left.append(number),
        )
        return Evaluation(changed(settings, max_samples=4, scale=()), state)

    first, slower = process(0), process(1)
    measure = slower._measure
    monkeypatch.setattr(slower, "_measure", lambda *a: go.wait(60) and measure(*a))
    with ThreadPoolExecutor(2) as pool:
        results, other = pool.submit(first.run), pool.submit(slower.run)
        while len(lines(settings.output_dir)) < 2 * 2 * SAMPLES:
            time.sleep(0.02)
        time.sleep(0.5)
        waited = not results.done() and sorted(left) == [0, 1]
        go.set()
        assert other.result() is None
        assert results.result()["adapters"][0]["image_only"]["samples"] == 4 * SAMPLES
    assert waited  # and in no group, which can abort a process that ends in it


def test_nothing_is_drawn_twice(settings, drawn):
    evaluate(
        changed(settings, max_samples=2, ip_adapter_path=settings.ip_adapter_path[:1], scale=(0.5,))
    )
    assert sum(drawn) == 2 * SAMPLES * 2
    drawn.clear()
    evaluate(
        changed(settings, max_samples=2, ip_adapter_path=settings.ip_adapter_path[:1], scale=(0.5,))
    )
    assert not drawn
    evaluate(
        changed(settings, max_samples=4, ip_adapter_path=settings.ip_adapter_path[:1], scale=(0.5,))
    )
    assert sum(drawn) == 2 * SAMPLES * 2
    drawn.clear()
    evaluate(changed(settings, max_samples=4, scale=(0.5,)))  # another adapter
    assert sum(drawn) == 4 * SAMPLES * 2
    drawn.clear()
    evaluate(changed(settings, max_samples=4))  # another weight
    assert sum(drawn) == 4 * SAMPLES * 2


def test_a_full_disk(settings, monkeypatch, straight):
    """The message says that nothing is lost, and nothing is."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*it goes on from here"):
        evaluate(settings)
    monkeypatch.undo()
    whole = evaluate(settings)
    agree(whole["adapters"], json.loads(straight)["adapters"])
