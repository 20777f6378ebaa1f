"""Nothing is drawn twice or lost, and the results are the same, whatever dies on the way."""

from __future__ import annotations

import json
import os
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


def lines(settings):
    files = sorted(Path(settings.output_dir).glob("*.jsonl"))
    return [line for path in files for line in path.open()]


def scores(settings):
    return Path(settings.output_dir, "scores-00000.jsonl")


def results(settings):
    return json.loads(Path(settings.output_dir, "results.json").read_bytes())


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
def test_killed_and_resumed(start, settings, measured):
    """Killed at whatever it is doing, the command goes on to the same results."""
    process = start(settings)
    while process.poll() is None and len(lines(settings)) < 20:
        time.sleep(0.02)
    process.kill()
    assert process.wait() != 0, "it was done before it could be killed"
    assert 20 <= len(lines(settings)) < 2 * 3 * PICTURES * SAMPLES
    assert start(settings).wait() == 0
    agree(results(settings), results(measured))


@pytest.mark.parametrize("torn", [1, 30, 200])
def test_torn_in_the_middle_of_a_line(done, measured, torn):
    """At any byte; what is there is kept, and nothing is glued to the rest of a line."""
    path = scores(done)
    os.truncate(path, path.stat().st_size - torn)
    agree(evaluate(done), results(measured))
    assert all(json.loads(line) for line in lines(done))


def test_damaged_lines_are_measured_again(done, measured, caplog):
    content = scores(done).read_bytes().split(b"\n")
    content[3] = b"\0" * 40
    content[9] = b'{"row": 1}'
    scores(done).write_bytes(b"\n".join(content))
    agree(evaluate(done), results(measured))
    assert "2 damaged lines" in caplog.text


@pytest.mark.nightly
def test_two_processes_measure_what_one_measures(start, settings, measured):
    assert start(settings, processes=2).wait() == 0
    agree(results(settings), results(measured))
    out = Path(settings.output_dir)
    parts = [path.read_text().count("\n") for path in sorted(out.glob("*.jsonl"))]
    assert len(parts) == 2 and min(parts) >= 2 * 3 * SAMPLES, "the work was not divided"
    assert sum(parts) == 2 * 3 * PICTURES * SAMPLES
    scores(settings).unlink()  # one process does what is then lacking
    assert start(settings).wait() == 0
    agree(results(settings), results(measured))


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
        answer, other = pool.submit(first.run), pool.submit(slower.run)
        while len(lines(settings)) < 2 * 2 * SAMPLES:
            time.sleep(0.02)
        time.sleep(0.5)
        waited = not answer.done() and sorted(left) == [0, 1]
        go.set()
        assert other.result() is None
        assert answer.result()["adapters"][0]["image_only"]["samples"] == 4 * SAMPLES
    assert waited  # and in no group, which can abort a process that ends in it


def test_nothing_is_drawn_twice(settings, drawn):
    both = settings.ip_adapter_path
    given = changed(settings, max_samples=2, ip_adapter_path=both[:1], scale=(0.5,))
    for more, rows in (
        ({}, 2),
        ({}, 0),
        ({"max_samples": 4}, 2),
        ({"ip_adapter_path": both}, 4),
        ({"scale": (0.5, 1.0)}, 4),  # with text only, of both adapters
    ):
        given = changed(given, **more)
        drawn.clear()
        evaluate(given)
        assert sum(drawn) == rows * SAMPLES * 2, more


def test_a_full_disk(settings, measured, monkeypatch):
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
    agree(evaluate(settings), results(measured))
