"""The measurement that runs on a GPU, on a CPU with small models; the kernel budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import on_device
from benchmarks.__main__ import LIMITS, main
from tests.support.checkpoint_layouts import SD15

TINY = replace(SD15, channels=32, context=64, multipliers=(1,), depths=(1,), heads=(4,), blocks=1)
MODELS = set(on_device.ROWS)


def test_without_a_gpu_it_says_what_it_found_and_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    said = capsys.readouterr().err
    assert "--device cuda needs a GPU that torch can use" in said
    assert f"torch {torch.__version__}" in said and "take --device cpu --small" in said


def test_a_gpu_is_timed_by_its_events_at_full_size_in_half_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(on_device.host.FLAGS_VARIABLE, "--any")
    made = on_device.plan("cuda", small=False, rounds=3, peer=None)
    assert (made.clock, made.dtype) == (on_device.DeviceClock, torch.float16)
    assert [(size.context, side) for size, side in made.sizes.values()] == [(768, 64), (2048, 128)]
    assert made.backend == "inductor"


def test_the_devices_clock_waits_once(monkeypatch):
    """Events are recorded in the device's queue, and read when it has done all of them."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = 10.0 * len(log)
            log.append("record")

        def elapsed_time(self, end):
            log.append("read")
            return end.at - self.at  # in milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    clock = on_device.DeviceClock()
    for _ in range(3):
        clock.mark()
    assert clock.intervals() == [0.01, 0.01]
    assert log == [*["record"] * 3, "wait", "read", "read"]


@pytest.mark.parametrize(
    "compiling", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["as is", "traced"]
)
def test_every_model_is_timed_with_and_without_compilation(host, monkeypatch, compiling):
    made = on_device.plan("cpu", small=True, rounds=1, peer=None)
    marks, traced = [], []
    mark, compiled = on_device.HostClock.mark, on_device.compiled

    def compile_or_not(model, backend):
        traced.append(model)
        return compiled(model, backend) if compiling else model

    monkeypatch.setattr(on_device, "compiled", compile_or_not)
    monkeypatch.setattr(on_device.HostClock, "mark", lambda self: marks.append(mark(self)))
    columns = on_device.measure(replace(made, sizes={"tiny": (TINY, 8)}))
    assert list(columns) == ["tiny", "tiny, compiled"]
    assert columns["tiny, compiled"].keys() == MODELS and columns["tiny"].keys() > MODELS
    assert all(seconds > 0 for seconds in columns["tiny, compiled"].values())
    assert len({*map(id, traced)}) == len(MODELS) and columns["tiny"]["syncs_per_step"] == 0
    # Both columns, a run to warm up and one that counts, a mark after every step.
    assert len(marks) == 2 * len(MODELS) * 2 * made.steps


def test_the_table_has_a_row_a_model_and_a_column_a_size():
    counts = {"kernels_per_layer": 2.0625, "kernels_per_layer_mask": 3, "syncs_per_step": 0}
    theirs = {"kernels_per_layer": 12.2, "kernels_per_layer_mask": 16, "syncs_per_step": 15}
    plain = {"none": 0.04, "one": 0.0404, **counts}
    plain |= {"peer_one": 0.05, **{f"peer_{name}": value for name, value in theirs.items()}}
    traced = {"none": 0.02, "one": 0.021, "peer_one": 0.03}
    assert on_device.table({"SD1.5": plain, "compiled": traced}).splitlines() == [
        "| ms per step (ratio to no adapter) | SD1.5 | compiled |",
        "| --- | --- | --- |",
        "| no adapter | 40.00 | 20.00 |",
        "| one prompt | 40.40 (1.010) | 21.00 (1.050) |",
        "| kernels added per layer and call | 2.06 | – |",
        "| the same with a mask | 3 | – |",
        "| synchronisations added per step | 0 | – |",
        "| ComfyUI_IPAdapter_plus: one prompt | 50.00 (1.250) | 30.00 (1.500) |",
        "| ComfyUI_IPAdapter_plus: kernels added per layer and call | 12.2 | – |",
        "| ComfyUI_IPAdapter_plus: the same with a mask | 16 | – |",
        "| ComfyUI_IPAdapter_plus: synchronisations added per step | 15 | – |",
    ]


@pytest.fixture(scope="module", params=["small", pytest.param("full", marks=pytest.mark.nightly)])
def counts(host, request):
    """Of a UNet with all of SD1.5's layers, or of SD1.5's itself."""
    from benchmarks import budget
    from benchmarks.full_size import Setup

    sizes = on_device.SMALL if request.param == "small" else on_device.FULL
    return budget.measure(Setup.build(*next(iter(sizes.values()))))


def test_within_budget(counts):
    limited = {
        *("kernels_per_layer", "kernels_per_layer_mask", "kernels_per_layer_curve"),
        "kernels_per_layer_face",
        *("syncs_per_step", "kernels_outside_window", "resident_adapter_parameters"),
    }
    assert limited < counts.keys()
    assert not {name: counts[name] for name in limited if counts[name] > LIMITS[name]}


def test_the_prompt_is_in_the_trace(counts):
    """One attention and one addition a layer at least: otherwise nothing was measured."""
    assert counts["kernels_per_layer"] >= 2
    assert counts["kernels_per_layer_face"] == counts["kernels_per_layer"]
    assert counts["kernels_per_layer_mask"] > counts["kernels_per_layer"]
    assert counts["kernels_per_layer_curve"] > counts["kernels_per_layer"]
    assert counts["syncs_per_step_windowed"] == 1


@pytest.mark.parametrize("kind", ["xlabs", "instantx"])
def test_flux_within_budget(flux, kind):
    """Three blocks of two streams and four of one; what a call costs once weighs more there."""
    from benchmarks import flux as measured

    found = measured.counts(measured.build(kind, flux.SMALL))
    for name in ("syncs_per_step", "kernels_outside_window", "rows_after_the_run"):
        assert found[name] == 0
    assert 2 < found["kernels_per_block"] < found["kernels_per_block_mask"] < 5
