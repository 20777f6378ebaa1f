"""The clock that tells the pack's own part of a sampling run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import share
from tools.comfyui.install import PACK


class Work:
    """CPU time as the tests spend it, in seconds."""

    done = 0

    def __call__(self, seconds: int) -> None:
        self.done += seconds

    def before(self, function: Callable[..., Any], seconds: int) -> Callable[..., Any]:
        """Let `function` take so long."""
        return lambda *args, **kwargs: self(seconds) or function(*args, **kwargs)


@pytest.fixture
def work(monkeypatch) -> Work:
    """Let nothing else take time."""
    work = Work()
    monkeypatch.setattr(share.time, "process_time", lambda: work.done)
    return work


@pytest.fixture
def clock(work) -> share.Clock:
    return share.Clock()


def test_what_is_called_of_the_hosts_does_not_count(clock, work):
    clock.ours(work.before(clock.theirs(work), 1))(30)
    assert clock.own == 1


def test_what_the_host_calls_of_ours_counts(clock, work):
    clock.ours(clock.theirs(work.before(clock.ours(work), 30)))(1)
    assert clock.own == 1


def test_an_error_does_not_stop_the_clock_in_the_middle(clock, work):
    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        clock.ours(work.before(clock.theirs(work.before(fails, 30)), 1))()
    assert clock.own == 1
    work(500)
    clock.ours(work)(2)
    assert clock.own == 3


def test_what_is_made_and_sampled_meanwhile_is_timed(small, clock, work, monkeypatch):
    """The host's attention takes 1 s, ours 1000 s, putting two conditionings together 10⁶ s."""
    host = importlib.import_module(f"{PACK}.ip_adapter_core.comfyui")
    patch, rows = host.decoupled_attention, host.prompt_rows.PromptRows
    monkeypatch.setattr(patch, "optimized_attention", work.before(patch.optimized_attention, 1))
    monkeypatch.setattr(patch, "image_attention", work.before(patch.image_attention, 10**3))
    monkeypatch.setattr(rows, "by_slot", work.before(rows.by_slot, 10**6))
    changed = vars(patch) | vars(rows) | vars(host.apply)

    def model() -> Any:
        return small.apply(small.model("tiny"), small.adapter("tiny"), small.images())

    def sample(model: Any) -> None:
        work.done, clock.own = 0, 0
        small.run(small.guider(model, small.text(1), small.text(2)), at=(0.5,))

    with share.timed(clock):
        sample(model())
        meanwhile = vars(patch) | vars(rows) | vars(host.apply)
    theirs = work.done % 10**3
    assert theirs and clock.own == work.done - theirs == 2 * 10**6 + theirs * 10**3

    assert vars(patch) | vars(rows) | vars(host.apply) == changed != meanwhile
    sample(model())
    assert work.done == 2 * 10**6 + theirs * (10**3 + 1) and clock.own == 0
