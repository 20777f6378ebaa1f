"""That the measures of training measure: what costs more is told as more."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from benchmarks import proportions, training
from benchmarks.reference_loop import Reference
from tests.support import image_folders, small_models
from tests.support.reference_training import dropped
from tools.comfyui.install import ROOT
from training.caching.dataset import CachedDataset
from training.metrics import MetricsLogger
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("arrow")
SIZE = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    small_models.base(folder / "base", "sd15")
    small_models.image_encoder(folder / "encoder")
    image_folders.with_metadata(folder / "pictures", 16, [(80, 64), (64, 64)])
    return folder


@pytest.fixture
def folder(made, monkeypatch, accelerate_anew) -> Path:
    """Small models, pictures and their cache."""
    monkeypatch.setattr(proportions, "SIZE", SIZE)
    if not (made / "cache").exists():
        training.fill_cache(made)
    return made


@pytest.fixture
def takes(monkeypatch) -> Callable[..., None]:
    """Let a method take so many seconds; nothing else takes any."""
    done = 0.0
    monkeypatch.setattr(time, "process_time", lambda: done)

    def takes(owner: Any, name: str, seconds: float) -> None:
        before = getattr(owner, name)

        def working(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += seconds
            return before(*args, **kwargs)

        monkeypatch.setattr(owner, name, working)

    return takes


def test_the_work_is_divided_as_that_of_sd15():
    found = proportions.counted()
    shares = {name: operations / sum(found.values()) for name, operations in found.items()}
    assert shares == pytest.approx(proportions.SD15, abs=proportions.TOLERANCE)


def test_other_proportions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(proportions.SD15, "text", 0.2)
    with pytest.raises(ValueError, match=r"text is 0\.\d% of a step; in SD1\.5 it is 20\.0%"):
        training.make(tmp_path)


def test_what_the_loop_adds_is_its_overhead(folder, takes):
    takes(UNet2DConditionModel, "forward", 10)
    assert training.loop_overhead(folder, rounds=3) == 1
    takes(MetricsLogger, "add", 1)
    assert training.loop_overhead(folder, rounds=3) == 1.1


@pytest.mark.nightly
def test_reading_a_row_is_the_loops_too(folder, takes):
    takes(UNet2DConditionModel, "forward", 10)
    takes(CachedDataset, "__getitem__", 1)
    assert training.loop_overhead(folder, rounds=3) == 1 + training.BATCH / 10


@pytest.mark.nightly
def test_what_a_cache_spares_is_its_speedup(folder, takes):
    takes(UNet2DConditionModel, "forward", 10)
    assert training.cache_speedup(folder, rounds=3) == 1
    takes(AutoencoderKL, "encode", 20)
    assert training.cache_speedup(folder, rounds=3) == 3


@pytest.mark.nightly
@pytest.mark.parametrize("loop", ["cache", "reference"])
def test_the_peak_of_a_process_of_its_own_in_bytes(folder, loop):
    assert 2e8 < training.peak(folder, loop) < 8e9


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage tells it")
def test_the_peak_is_not_that_of_the_process_that_started_it():
    much = 2 * 2**30
    held = torch.ones(much, dtype=torch.uint8)
    told = "from benchmarks import training; print(training.peak_of_this_process())"
    command = [sys.executable, "-c", told]
    done = subprocess.run(command, cwd=training.ROOT, check=True, capture_output=True, text=True)
    del held
    assert 1e8 < int(done.stdout) < much


@pytest.mark.nightly
def test_the_bare_step_trains_as_the_loop_does(folder):
    run = Trainer(training.config(folder))
    training.bare_step(run, next(run.batches))
    given = training.config(folder, max_train_steps=1)
    Trainer(given).train()
    trained = load_file(Path(given.output_dir, "checkpoints", "step-0000001", "model.safetensors"))
    torch.testing.assert_close(dict(run.sampled().state_dict()), trained)


def test_the_reference_computes_the_loss_of_train_py(folder):
    drops = {"i_drop_rate": 0.3, "t_drop_rate": 0.3, "ti_drop_rate": 0.0}
    raw = {"feature_cache_dir": None, "train_data_dir": str(folder / "pictures")}
    given = training.config(folder, train_batch_size=8, **raw, **drops)
    run = Trainer(given)
    weights = {name: w.clone() for name, w in run.sampled().state_dict().items()}
    reference = Reference(given, folder / "pictures", weights).model
    batch: dict[str, Any] = dict(next(run.batches))
    assert 0 < batch["drop_image"].sum() < 8 and 0 < batch["drop_text"].sum() < 8
    empty = run.encoders.tokenise("")
    heard = {**batch, "tokens": dropped(batch["tokens"], empty, batch["drop_text"])}
    expected = run.training_loss(batch)
    latents = reference.latents(batch["pixels"], batch["latent_noise"])
    found = reference.loss(heard, latents, batch["noise"], batch["timestep"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    expected.backward()
    found.backward()
    theirs = sum(p.grad.square().sum() for p in reference.trained.values() if p.grad is not None)
    ours = sum(p.grad.square().sum() for p in run.adapter.parameters() if p.requires_grad)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=0)


@pytest.mark.nightly
def test_the_reference_sees_the_same_pixels(folder):
    given = training.config(folder, feature_cache_dir=None, train_data_dir=str(folder / "pictures"))
    run = Trainer(given)
    reference = Reference(given, folder / "pictures", run.sampled().state_dict())
    theirs = torch.stack([row["pixels"] for row in reference.dataset])
    for pixels in next(run.batches)["pixels"]:
        assert (theirs == pixels).flatten(1).all(1).sum() == 1


@pytest.mark.nightly
def test_a_slow_disk_is_waited_for(folder, monkeypatch):
    read = CachedDataset.__getitem__
    monkeypatch.setattr(
        CachedDataset, "__getitem__", lambda self, index: time.sleep(0.5) or read(self, index)
    )
    assert training.waiting_for_data(folder, rounds=4) > 0.3


@pytest.mark.nightly
def test_a_checkpoint_is_two_bytes_a_weight(tmp_path):
    assert 0 < training.checkpoint_bytes(tmp_path) - 2 * 22_319_616 < 10_000


ALONE = """
import mmap, sys
from pathlib import Path
sys.path.append(sys.argv[2])
from benchmarks import rows

path, size = Path(sys.argv[1]), 64 * 2**20
path.write_bytes(bytes(size))
before = rows.own_memory()
with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    assert sum(mapped[:: mmap.PAGESIZE]) == 0
    after = rows.own_memory()
    assert abs(after - before) < size / 4, (before, after)
    own = bytearray(b"1") * size
    assert rows.own_memory() - after > 0.9 * size, (after, rows.own_memory())
"""


@pytest.mark.nightly
def test_own_memory_is_what_lies_in_no_file(tmp_path):
    """In a process of its own: one that has freed memory takes no new for its next needs."""
    command = [sys.executable, "-c", ALONE, str(tmp_path / "mapped"), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
