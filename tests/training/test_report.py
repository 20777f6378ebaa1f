"""A run's page and `metrics.jsonl`: what they show, and that going on changes nothing of it."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import shutil
import signal
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from tests.support import image_folders, small_models
from training import report
from training.config import TrainConfig
from training.history import History
from training.metrics import MetricsLogger
from training.report import RunReport, charts, smoothed, thinned
from training.validation import Validation

HOSTILE = (
    "</td></script><script>alert('x')</script>\"><img src=https://example.org/x.png onerror=1>"
)
TIMES = ("seconds", "samples_per_second", "waiting_for_data")
pytestmark = pytest.mark.usefixtures("arrow")


class Page(HTMLParser):
    """What a browser finds in a page: tags with their attributes, and its text."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.text, self.curves = [], "", {}
        self.feed(Path(folder, "report.html").read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if "aria-label" in found:
            self._chart = self.curves.setdefault(found["aria-label"].split(", over")[0], [])
        if tag == "polyline":
            pairs = (point.split(",") for point in found["points"].split())
            self._chart.append({int(x): float(y) for x, y in pairs})

    def handle_data(self, data):
        self.text += f"\n{data.strip()}"

    @property
    def sheets(self):
        return [found["src"] for tag, found in self.tags if tag == "img"]

    @property
    def addresses(self):
        names = ("href", "src", "srcset", "action", "data", "xlink:href")
        return [found[name] for _, found in self.tags for name in names if name in found]


@pytest.fixture
def watched(settings, pictures, tmp_path):
    """The config of a run with validation, of data with broken pictures."""
    small_models.clip(tmp_path / "clip")
    image_folders.image(99).save(tmp_path / "reference.png")
    data = shutil.copytree(pictures, tmp_path / "pictures")
    for name in ("03.png", "17.png", "29.png"):
        os.truncate(data / name, 50)

    def watched(**changes):
        given = {
            "train_data_dir": str(data),
            "validation_steps": 2,
            "validation_image": [str(tmp_path / "reference.png")],
            "validation_scale": [0.0, 1.0],
            "validation_num_inference_steps": 1,
            "validation_clip_model": str(tmp_path / "clip"),
        }
        return settings(**given | changes)

    return watched


@pytest.fixture
def history(tmp_path):
    return History(tmp_path, 100)


@pytest.fixture
def show(settings, history, tmp_path):
    """Write the page of a run that has logged what `history` holds; `changes` of its settings."""

    def show(step=100, left_out=(), **changes):
        given = settings(output_dir=str(tmp_path), max_train_steps=100, **changes)
        RunReport(given, history, left_out, {"device": "cpu"}).write(step, "training")
        return Page(tmp_path)

    return show


@pytest.fixture
def written(monkeypatch):
    """Steps and states that the page is written at."""
    found, write = [], RunReport.write

    def noting(page, step, state):
        write(page, step, state)
        found.append((step, state))

    monkeypatch.setattr(RunReport, "write", noting)
    return found


def records(config, without=()):
    lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def test_a_small_run_shows_what_it_logged(watched, train, written):
    given = watched(report_to="tensorboard", checkpointing_steps=2, validation_prompt=["", HOSTILE])
    train(given)
    assert written == [(0, "training"), (2, "training"), (4, "finished")]
    page = Page(given.output_dir)
    (events,) = Path(given.output_dir, "logs", "ip-adapter").glob("events*")
    log = EventAccumulator(str(events)).Reload()

    def logged(name):
        return {event.step: pytest.approx(event.value) for event in log.Scalars(name)}

    assert list(logged("loss")) == [1, 2, 3, 4]
    assert page.curves["Loss"] == [logged("loss")]
    assert page.curves["Learning rate"] == [logged("learning_rate")]
    assert page.curves["Samples per second"] == [logged("samples_per_second")]
    likeness = [logged(f"validation/clip_i/weight_{weight}") for weight in (0, 1)]
    assert list(likeness[0]) == [0, 2, 4]
    assert page.curves["CLIP-I: likeness to the reference"] == likeness
    assert page.sheets == [f"validation/step-{step:06}.png" for step in (4, 2, 0)]
    assert "State\nfinished" in page.text and "4 of 4" in page.text
    for line in Path(given.output_dir, "broken-pictures-0.txt").read_text().splitlines():
        assert line in page.text
    assert f'["", {json.dumps(HOSTILE)}]' in page.text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    for address in page.addresses:
        assert Path(given.output_dir, address).is_file() and ".." not in address


def test_a_resumed_run_has_the_series_of_one_that_never_stopped(
    watched, train, tmp_path, monkeypatch
):
    """Killed between a checkpoint and its validation, within what is averaged for the log."""
    straight = watched(max_train_steps=6, checkpointing_steps=4, logging_steps=3)
    drawn, call = [], Validation.__call__

    def noting(validation, accelerator, adapter, step):
        drawn.append(step)
        return call(validation, accelerator, adapter, step)

    monkeypatch.setattr(Validation, "__call__", noting)
    train(straight)
    assert drawn == [0, 2, 4, 6]
    parts = replace(straight, output_dir=str(tmp_path / "parts"))

    for at, before in ((4, True), (6, False)):

        def killed(*given, at=at, before=before):
            if given[-1] == at and before:
                raise KeyboardInterrupt
            noting(*given)
            if given[-1] == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Validation, "__call__", killed)
            train(parts)
    assert drawn[4:] == [0, 2, 4, 6]
    with Path(parts.output_dir, "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    train(parts)
    assert drawn[8:] == [6]
    assert records(parts, TIMES) == records(straight, TIMES)
    assert [x["step"] for x in records(parts) if "loss" in x] == [3, 6]
    seconds = [x["seconds"] for x in records(parts)]
    assert seconds == sorted(seconds)
    broken, page = "broken-pictures-0.txt", Page(parts.output_dir)
    found = [Path(x.output_dir, broken).read_text() for x in (straight, parts)]
    assert found[0] == found[1] != ""
    alike = Page(straight.output_dir)
    names = {*alike.curves} - {"Samples per second", "Share of the time spent waiting for data"}
    assert {n: page.curves[n] for n in names} == {n: alike.curves[n] for n in names}
    assert page.sheets == alike.sheets


def test_without_a_terminal_there_are_lines(settings, train, caplog, written):
    with caplog.at_level("INFO", "training"):
        train(settings(max_train_steps=4, logging_steps=2, checkpointing_steps=2))
    assert written == [(2, "training"), (4, "finished")]
    said = [line for line in caplog.messages if "samples/s" in line]
    assert [line.split(":")[0] for line in said] == ["step 2 of 4", "step 4 of 4"]
    for line in said:
        assert "learning rate 0.001, " in line and line.endswith(" left")


def test_in_a_terminal_the_bar_says_it(history, accelerate_anew, tmp_path, caplog):
    metrics = MetricsLogger(Accelerator(cpu=True), tmp_path, 10, history)
    with tqdm(total=100, file=io.StringIO()) as bar, caplog.at_level("INFO", "training"):
        metrics.add(torch.tensor(0.5), {"weight": torch.ones(2), "broken": []})
        metrics.report(10, 1e-4, bar)
    assert bar.postfix.startswith("loss 0.5000, learning rate 0.0001, ")
    assert bar.postfix.endswith(" samples/s") and not caplog.messages


def test_the_time_left(history, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("training.history.time.perf_counter", lambda: now[0])
    history.log({"loss": 1.0}, step=40)
    resumed = History(history.path.parent, 100)
    resumed.resume(40)
    assert resumed.seconds_left(40) is None
    now[0] += 30  # the first samples
    resumed.begin()
    now[0] += 50
    assert resumed.seconds_left(50) == 250
    assert resumed.seconds_left(100) == 0


@pytest.mark.parametrize("step, kept", [(0, []), (1, [1]), (2, [1, 2, 2]), (9, [1, 2, 2, 3])])
@pytest.mark.parametrize("torn", ['{"step": 9, "se', '{"step": 9\n{"step": 9, "seconds": 1}\n'])
def test_what_came_after_the_checkpoint_is_cut_off(history, step, kept, torn):
    for at in (1, 2, 2, 3):
        history.log({"loss": torch.tensor(0.5)}, step=at)
    with history.path.open("a") as file:
        file.write(torn)
    history.resume(step)
    assert [json.loads(line)["step"] for line in history.path.open()] == kept


def test_means_and_broken_pictures_go_on_from_the_checkpoint(history, accelerate_anew, tmp_path):
    def logger():
        return MetricsLogger(Accelerator(cpu=True), tmp_path, 10, history)

    def add(metrics, loss, *broken):
        metrics.add(torch.tensor(loss), {"weight": torch.ones(2), "broken": broken})

    def loss():
        return history.series()["loss"].popitem()[1]

    first, file = logger(), tmp_path / "broken-pictures-0.txt"
    add(first, 0.5, "a.png: cut short", "b.png: no picture")
    state = first.state()
    add(first, 9.0, "c.png: cut short")
    resumed = logger()
    resumed.accelerator.trackers = [history]
    resumed.resume(state)
    assert file.read_text() == "a.png: cut short\nb.png: no picture\n"
    add(resumed, 1.0, "b.png: no picture", "d.png: cut short")
    resumed.report(10, 1e-4, tqdm(disable=True))
    assert file.read_text() == "a.png: cut short\nb.png: no picture\nd.png: cut short\n"
    assert history.series()["broken_pictures"] == {10: 3}
    assert loss() == (0.5 + 1.0) / 2
    of_two = logger()  # what two processes had noted, in one
    of_two.accelerator.trackers = [history]
    of_two.resume([*state, {**state[0], "total": 1.5}])
    add(of_two, 1.0)
    of_two.report(20, 1e-4, tqdm(disable=True))
    assert loss() == (1.0 + 1.0) / 2
    logger().resume([])
    assert file.read_text() == ""


def test_every_scalar_has_a_curve(history, show):
    history.log({"loss": 0.5, "broken_pictures": 0, "note": "a text"}, step=50)
    history.log({"loss": math.nan, "held_out_loss": np.float32(0.25)}, step=100)
    history.log({"validation/loss": 0.5, "validation/loss/early": 0.75}, step=100)
    history.log({"validation/loss/late": 0.0}, step=100)
    history.log({"validation/new_score": 0.125, '"><script>alert(1)//': 1.5}, step=100)
    curves = show().curves
    assert curves.pop("Loss") == [{50: 0.5}]
    assert curves.pop("Held out loss") == [{100: 0.25}]
    assert curves.pop("Validation/loss") == [{100: 0.5}, {100: 0.75}, {100: 0.0}]
    assert curves.pop("Validation/new score") == [{100: 0.125}]
    ((hostile, points),) = curves.items()
    assert hostile.startswith('"><script>alert') and points == [{100: 1.5}]


def test_points_lie_where_the_axes_say(history):
    for step, value in ((10, 0.31), (20, 0.12), (80, 0.27)):
        history.log({"loss": value, "constant": 1e-4}, step=step)
    for chart in charts(history.series(), 100):
        across, _, _, up, left, top = chart.matrix
        places = [(across * x + left, up * y + top) for x, y in chart.curves[0].points]
        for x, y in places:
            assert chart.left <= x <= chart.right and chart.top <= y <= chart.bottom
        assert chart.steps == [0, 20, 40, 60, 80, 100]
        assert replace(chart, last=1).steps == [0, 1]
        ends = [up * value + top for value in (chart.values[0], chart.values[-1])]
        assert ends == pytest.approx([chart.bottom, chart.top])
    assert chart.values[0] == 0 and chart.values[-1] == pytest.approx(2e-4)


def test_long_series_are_smoothed_and_thinned():
    noise = np.random.default_rng(0).normal(1, 0.1, 10_000)
    noise[1234] = 9.0
    points = list(enumerate(noise.tolist()))
    shown = thinned(points)
    assert len(shown) <= report.POINTS and (1234, 9.0) in shown
    assert set(shown) <= set(points) and shown == sorted(shown)
    smooth = [value for _, value in smoothed(points)]
    assert smooth[0] == noise[0]
    assert np.std(smooth[2000:]) < 0.02 and np.mean(smooth) == pytest.approx(1, abs=0.02)
    (chart,) = charts({"loss": dict(points)}, 10_000)
    assert [curve.label for curve in chart.curves] == ["as logged", "smoothed"]
    assert 1 < chart.values[-1] < 2  # the outlier does not flatten the rest


def test_settings_that_were_given_come_first(show):
    text = show(left_out=["a <b>.png: broken"], learning_rate=0.125, t_drop_rate=0.05).text
    given, rest = text.split("settings at their defaults")
    assert "learning_rate" in given and "0.125" in given and "0.0001" in given
    assert "t_drop_rate" in rest and "t_drop_rate" not in given
    assert all(text.count(f"\n{name}\n") == 1 for name in TrainConfig.__dataclass_fields__)
    assert "a <b>.png: broken" in text


def test_sheets_of_a_try_that_came_further_are_not_shown(show, tmp_path):
    (tmp_path / "validation").mkdir()
    for name in ("step-000002.png", "step-1000000.png", "step-000030.png", "step-x.png", "a.png"):
        (tmp_path / "validation" / name).touch()
    assert show(30).sheets == ["validation/step-000030.png", "validation/step-000002.png"]


def test_a_full_disk_does_not_end_the_training(history, show, forked, tmp_path):
    """Files cannot grow beyond a limit, as on a disk that is full: real writes fail half-way."""
    history.log({"loss": 0.5}, step=1)
    show()
    before = (tmp_path / "report.html").read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        full = history.path.stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, unlimited[1]))
        history.log({"loss": 0.25}, step=2)
        show()
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        history.log({"loss": 0.75}, step=3)

    process = forked(child)
    process.join(60)
    assert process.exitcode == 0
    assert history.series() == {"loss": {1: 0.5, 3: 0.75}}
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
