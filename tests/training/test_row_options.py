"""Several captions, rows held out, values balanced: from pictures and from a cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import image_folders
from training import cache
from training.caching.dataset import CachedDataset
from training.data.columns import read_column
from training.data.dataset import RawDataset, collate
from training.data.sources import open_source
from training.dataloader import Position, open_data
from training.errors import TrainingError
from training.trainer import Trainer

ROWS = 24
BROKEN = 3
HELD_OUT = (0, 7, 13, 20, 21)
RARE = (5, 6)
ALL = {"validation_split_column": "split", "balance_column": "hand", "default_caption": ""}
pytestmark = pytest.mark.usefixtures("arrow")


@pytest.fixture
def people(tmp_path):
    """Pictures by two hands, with none to three captions each; one cannot be read."""
    folder, lines = tmp_path / "people", []
    image_folders.with_metadata(folder, ROWS, [(80, 70)])
    (folder / f"{BROKEN:04}.png").write_bytes(b"no picture")
    for row in range(ROWS):
        values = {
            "file_name": f"{row:04}.png",
            "text": [f"caption {place} of {row}" for place in range(row % 4)],
            "split": "test" if row in HELD_OUT else "train",
            "hand": "left" if row in RARE else "right",
        }
        lines.append(json.dumps(values))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def cached(cache_settings, people, accelerate_anew):
    """Settings of a cache of these pictures, with changes."""

    def cached(**changes):
        accelerate_anew()
        given = {"train_data_dir": str(people), "default_caption": "", "cache_dtype": "float32"}
        return cache_settings(**{**given, "rows_per_shard": 7, **changes})

    return cached


@pytest.fixture
def given(settings, people, cached):
    """The config of a small run, from the pictures or from a cache of them."""

    def given(kind, **changes):
        changes = {"train_data_dir": str(people), **ALL, **changes}
        if kind == "cache":
            columns = {"validation_split_column": "split", "balance_column": "hand"}
            made = cached(**columns)
            if not Path(made.output_dir).exists():
                cache.make(made)
            changes |= {"feature_cache_dir": made.output_dir, "train_data_dir": None}
        return settings(**changes)

    return given


@pytest.fixture
def rows_read(monkeypatch):
    """Rows of the source that datasets are asked for, in order; of a cache, which has no BROKEN."""
    found = []

    def noting(kind):
        get = kind.__getitem__

        def noted(dataset, index):
            behind = kind is CachedDataset and index[1] >= BROKEN
            found.append(index[1] + behind)
            return get(dataset, index)

        monkeypatch.setattr(kind, "__getitem__", noted)

    noting(RawDataset)
    noting(CachedDataset)
    return found


@pytest.fixture
def logged(monkeypatch):
    """What trackers are given, by name: a list of (step, value)."""
    found = {}

    def log(accelerator, values, step):
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))

    monkeypatch.setattr(Accelerator, "log", log)
    return found


KINDS = pytest.mark.parametrize("kind", ["pictures", "cache"])
FILES = ("adapter.safetensors", "model.safetensors", "optimizer.bin", "scheduler.bin")


def files(config, step):
    folder = Path(config.output_dir, "checkpoints", f"step-{step:07}")
    return {name: (folder / name).read_bytes() for name in FILES}


def weights(config, step):
    return load_file(Path(config.output_dir, f"checkpoints/step-{step:07}/model.safetensors"))


@KINDS
@pytest.mark.parametrize("balance", [None, "hand"])
def test_going_on_in_the_middle_of_a_pass(kind, balance, given, tmp_path, train, caplog):
    """It gives the same files, whatever was measured on the way."""
    straight = given(kind, balance_column=balance, max_train_steps=6)
    train(straight)
    assert "validation_steps is 0: the loss of the rows held out is not measured" in caplog.text
    parts = replace(straight, output_dir=str(tmp_path / "parts"), validation_steps=2)
    train(replace(parts, max_train_steps=3))
    train(parts)
    assert files(straight, 6) == files(parts, 6)
    for change in ({"validation_split_column": None}, {"balance_column": "split"}):
        (name,) = change
        with pytest.raises(TrainingError, match=f"{name} was "):
            train(replace(straight, max_train_steps=7, **change))


@pytest.mark.parametrize("changes", [{}, {"balance_column": None}])
def test_from_a_cache_it_learns_the_same(changes, given, people, tmp_path, train):
    (people / f"{BROKEN:04}.png").write_bytes((people / "0000.png").read_bytes())  # else other rows
    raw = given("pictures", **changes)
    cached = given("cache", output_dir=str(tmp_path / "from-cache"), **changes)
    for config in (raw, cached):
        train(config)
    expected, found = weights(raw, 4), weights(cached, 4)
    start = Trainer(replace(raw, output_dir=str(tmp_path / "new"))).sampled().state_dict()
    moved = sum((expected[k] - start[k]).square().sum() for k in expected) ** 0.5
    apart = sum((expected[k] - found[k]).square().sum() for k in expected) ** 0.5
    assert moved > 0
    assert apart < 1e-3 * moved


@KINDS
def test_rows_held_out_are_only_measured(kind, given, rows_read, logged):
    trained = {*range(ROWS)} - {*HELD_OUT}
    trained -= {BROKEN} if kind == "cache" else set()
    trainer = Trainer(given(kind, balance_column=None, validation_steps=1, max_train_steps=1))
    rows_read.clear()
    for _ in range(20):
        next(trainer.batches)
    assert {*rows_read} == trained
    rows_read.clear()
    trainer.train()
    assert {*rows_read} - trained == {*HELD_OUT}
    assert [step for step, _ in logged["validation_loss"]] == [0, 1]


@KINDS
def test_the_rare_value_is_as_frequent(kind, given, rows_read):
    trainer = Trainer(given(kind))
    rows_read.clear()
    for _ in range(50):
        next(trainer.batches)
    rare = sum(row in RARE for row in rows_read)
    assert abs(rare - 100) < 4 * 50**0.5
    assert not {*rows_read} & {*HELD_OUT}


@KINDS
def test_the_loss_of_rows_held_out(kind, given, logged, caplog, train):
    """It is their mean, nothing dropped, of the average weights, at each validation anew."""
    more = {"use_ema": True, "ema_decay": 0.5, "validation_steps": 2, "i_drop_rate": 0.9}
    with caplog.at_level("INFO", "training"):
        trainer = train(given(kind, **more, t_drop_rate=0.1, ti_drop_rate=0.0))
    steps, (_, at_two, measured) = zip(*logged["validation_loss"], strict=True)
    assert steps == (0, 2, 4)
    assert at_two != measured
    assert f"step 4: validation loss {measured:.5f}" in caplog.text
    assert "'split' holds out 'test': 5" in caplog.text
    losses = []
    for batch in trainer.held_out():
        batch = trainer.encode(batch)
        for place in range(len(batch["weight"])):
            one = {k: v[place : place + 1] for k, v in batch.items() if torch.is_tensor(v)}
            one |= {name: torch.tensor([False]) for name in ("drop_image", "drop_text")}
            with torch.no_grad():
                losses.append(trainer.loss(trainer.ema.module, one).item())
    assert len(losses) == len(HELD_OUT)
    assert measured == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    state = torch.get_rng_state()
    trainer.measure_held_out()
    assert torch.equal(state, torch.get_rng_state())


def test_the_loss_that_a_kill_prevented(given, train, monkeypatch):
    """It is measured when the run goes on, and what was measured is not measured again."""
    config = given("pictures", validation_steps=2, checkpointing_steps=2, report_to="none")
    straight = train(replace(config, output_dir=config.output_dir + "-straight"))

    def killed(trainer):
        if trainer.step == 2:
            raise KeyboardInterrupt
        measure(trainer)

    measure = Trainer.measure_held_out
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "measure_held_out", killed)
        train(config)
    for _ in range(2):  # at the end there is nothing more to measure
        trainer = train(config)
        found, expected = (x.history.series()["validation_loss"] for x in (trainer, straight))
        assert found == expected and [*found] == [0, 2, 4]
    lines = trainer.history.path.read_text().splitlines()
    assert sum("validation_loss" in line for line in lines) == 3


def test_a_broken_picture_counts_for_nothing(given, people, logged, train):
    nothing = {"learning_rate": 0.0, "i_drop_rate": 0.0, "t_drop_rate": 0.0, "ti_drop_rate": 0.0}
    config = given("pictures", validation_steps=1, max_train_steps=1, **nothing)
    train(config)
    (people / f"{HELD_OUT[1]:04}.png").write_bytes(b"no picture")
    out = replace(config, output_dir=config.output_dir + "2")
    trainer = train(out)
    (_, whole), _, (_, fewer), _ = logged["validation_loss"]
    named = Path(out.output_dir, "broken-pictures-0.txt").read_text()
    assert f"{HELD_OUT[1]:04}.png" in named
    batches = [*trainer.held_out()]
    assert [batch["weight"].tolist() for batch in batches] == [[1, 0, 1, 1], [1]]
    total = sum(trainer.held_out_loss(batch).item() * len(batch["weight"]) for batch in batches)
    assert fewer == pytest.approx(total / 4, rel=1e-5)
    assert whole != pytest.approx(fewer, rel=1e-5)


@KINDS
def test_two_processes_follow_one(kind, given, tmp_path, train, two_ranks):
    changes = {"validation_steps": 3, "report_to": "tensorboard", "use_ema": True}
    one = given(kind, **changes)
    trainer = Trainer(one)
    before = {key: value.clone() for key, value in trainer.sampled().state_dict().items()}
    trainer.train()
    two = replace(one, train_batch_size=2, output_dir=str(tmp_path / "two"))
    two_ranks(lambda: Trainer(two).train())
    expected = weights(one, 4)
    for key, value in weights(two, 4).items():
        assert (value - expected[key]).norm() < 1e-3 * (expected[key] - before[key]).norm()
    measured = []
    for config in (one, two):
        (events,) = Path(config.output_dir, "logs", "ip-adapter").glob("events*")
        found = EventAccumulator(str(events))
        found.Reload()
        measured.append([event.value for event in found.Scalars("validation_loss")])
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    assert len(measured[0]) == 2


def test_a_cache_has_all_captions(given, people):
    """Any sample is given the caption that it would be given from the pictures."""
    config = given("cache", seed=11)
    trainer = Trainer(config)
    encoders, timesteps = trainer.encoders, 1000
    position = Position(0, 1, 4, 0)
    found = open_data(config, encoders, timesteps, position).batches.dataset
    raw_config = given("pictures", seed=11, output_dir=config.output_dir + "2")
    expected = open_data(raw_config, encoders, timesteps, position).batches.dataset
    assert len(found) == len(expected) - 1
    texts = set()
    for number in range(3 * ROWS):
        row = number % (ROWS - 1)
        same = encoders.encode(collate([expected[number, row + (row >= BROKEN)]]))
        states = found[number, row]["states"]
        assert torch.allclose(states, same["states"][0], atol=1e-5), (number, row)
        texts.add((row, *states[-1, :4].tolist()))
    assert len(texts) > 1.25 * ROWS  # of a row one or the other
    source = open_source(people, default_caption="")
    assert {len(source[row].texts) for row in range(ROWS)} == {1, 2, 3}


def test_a_column_is_added_to_a_cache_without_encoding(given, cached, train):
    cache.make(cached(validation_split_column="split"))
    folder = Path(cached().output_dir)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    config = given("cache")
    with pytest.raises(TrainingError, match=r"not hold the column 'hand' \(it holds split\).*anew"):
        train(config)
    cache.make(cached(balance_column="hand"))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == written
    train(config)
    (folder / "columns.safetensors").write_bytes(b"cut")
    with pytest.raises(TrainingError, match=r"columns\.safetensors' cannot be read.*Delete it"):
        train(replace(config, output_dir=config.output_dir + "2"))


def test_a_caches_columns_are_of_its_rows(given, people):
    config = given("cache")
    rows = CachedDataset(config.feature_cache_dir, "image_embeds", cache.NO_DRAWS)
    expected = read_column(people, "hand").of_row.tolist()
    del expected[BROKEN]
    assert rows.column("hand").of_row.tolist() == expected
    assert rows.column("hand").values == ("right", "left")


def test_a_cache_tells_a_wrong_column_before_it_encodes(cached, people, monkeypatch):
    monkeypatch.setattr(cache, "load_encoders", lambda *_: pytest.fail("a model was read"))
    with pytest.raises(TrainingError, match="no column 'foot'; its columns are file_name, text"):
        cache.make(cached(balance_column="foot"))
    with pytest.raises(TrainingError, match="'hand' holds out none of 24 rows"):
        cache.make(cached(validation_split_column="hand"))


def test_a_cache_of_one_caption_a_row_is_as_it_was(cached, people):
    """Older versions read it, and what they began is gone on with."""
    metadata = people / "metadata.jsonl"
    formats = {}
    for several in (True, False):
        if not several:
            lines = map(json.loads, metadata.read_text().splitlines())
            metadata.write_text("\n".join(json.dumps(x | {"text": "one"}) for x in lines))
        config = cached(output_dir=cached().output_dir + str(several))
        cache.make(config)
        folder = Path(config.output_dir)
        names = {*load_file(folder / "shard-00000.safetensors")}
        formats[several] = json.loads((folder / "cache.json").read_text())["format"]
        assert ("captions" in names) == several
        assert not (folder / "columns.safetensors").exists()
    assert formats == {True: 2, False: 1}


def test_shards_have_no_such_columns(settings, tmp_path, train):
    png = image_folders.encoded(image_folders.image(0))
    files = {"0.png": png, "0.json": b'{"text": "x", "hand": "left"}'}
    shard = image_folders.shard(tmp_path / "a.tar", files)
    for name in ("balance_column", "validation_split_column"):
        with pytest.raises(TrainingError, match="column hand says of all samples is not known"):
            train(settings(train_data_dir=shard, **{name: "hand"}))


def test_a_column_that_there_is_not(given, train):
    for name in ("balance_column", "validation_split_column"):
        with pytest.raises(TrainingError, match="no column 'foot'; its columns are file_name"):
            train(given("pictures", **{name: "foot"}))
