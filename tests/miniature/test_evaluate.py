"""The command: what it writes, and that it fails where a demand is missed."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest

from miniature import evaluate, files
from tests.miniature.test_thresholds import GOOD, broken


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command with `figures` in place of what a server draws; keeps what it wrote."""
    monkeypatch.setattr(evaluate.setup, "ensure", lambda: tmp_path)
    monkeypatch.setattr(evaluate.install, "require", lambda: tmp_path)
    monkeypatch.setattr(evaluate, "Server", lambda *_, **__: contextlib.nullcontext())
    out = tmp_path / "a folder" / "figures.json"
    arguments = ["--seeds", "2", "--no-figures", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])

    def run(figures):
        whole = {key: value for key, value in figures.items() if key != "findings"}
        (one,) = figures["findings"]["sets"]
        monkeypatch.setattr(evaluate, "run", lambda *_: (whole, {}, None))
        monkeypatch.setattr(evaluate, "experiment", lambda _, count, seed: {**one, "seed": seed})
        try:
            evaluate.main()
        finally:
            run.written = json.loads(out.read_text("utf-8"))

    return run


def test_good_figures_are_written_and_told(run, capsys):
    run(GOOD)
    assert [one["seed"] for one in run.written["findings"]["sets"]] == [1, 2]
    assert run.written["build"] == files.checksums() and run.written["made"] == files.made()
    assert "MISS" not in capsys.readouterr().out


def test_a_missed_demand_fails_and_the_figures_are_kept(run, capsys):
    with pytest.raises(SystemExit) as failed:
        run(broken("colour_follows", 0.5))
    assert failed.value.code
    assert "MISS colour follows" in capsys.readouterr().out
    assert run.written["colour_follows"] == 0.5
