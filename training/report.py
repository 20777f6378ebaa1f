"""A run's own page, `report.html`: state, curves, samples over time, settings.

It opens from the disk in any browser: it refers to the samples beside it and to nothing else. The
template is `report.html` in this folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from accelerate import Accelerator
from tqdm import tqdm

from ip_adapter_core.contact_sheet import DARK, LIGHT
from ip_adapter_core.files.atomic import atomic

from .config import TrainConfig
from .history import History
from .metrics import BROKEN
from .validation import FOLDER as SHEETS

FILE = "report.html"
TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "samples_per_second": "Samples per second",
    "waiting_for_data": "Share of the time spent waiting for data",
    "broken_pictures": "Pictures that could not be read",
    "validation/clip_i": "CLIP-I: likeness to the reference",
    "validation/clip_t": "CLIP-T: likeness to the text",
}
SMOOTHED = {"loss", "samples_per_second", "waiting_for_data"}
PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "open_clip_torch")
NAMED = 50  # pictures left out that the page names
POINTS = 600  # of a curve, about as many as a screen shows
FAINT = "faint"  # what stands behind a smoothed curve
DOTS = 60  # points of a curve that are shown one by one
_SHEET = re.compile(r"step-(\d+)\.png")

logger = logging.getLogger(__name__)

Points = Sequence[tuple[int, float]]


class Curve(NamedTuple):
    """A line of a chart: `points` (step, value), and how it is drawn: a class of the page's CSS."""

    label: str
    points: Points
    style: str

    @property
    def dots(self) -> Points:
        """The points to show one by one, if they are few."""
        return self.points if len(self.points) <= DOTS else ()

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value to show, a few outliers aside where it is smoothed."""
        values = sorted(value for _, value in self.points)
        aside = len(values) // 50 if self.style.endswith(FAINT) else 0
        return values[aside], values[-1 - aside]


@dataclass(frozen=True)
class Chart:
    """Curves over steps 0 to `last`, and the lines of their grid."""

    title: str
    curves: Sequence[Curve]
    last: int

    # Of the drawing in pixels, and the place of the curves in it.
    width, height = 480, 220
    left, right, top, bottom = 58, 468, 8, 194

    @property
    def steps(self) -> list[int]:
        """Steps to mark on the axis."""
        return [round(x) for x in _ticks(0, self.last, 5, integer=True) if 0 <= x <= self.last]

    @property
    def values(self) -> list[float]:
        """Values to mark on the axis, which ends at the first and the last of them."""
        ends = [curve.ends for curve in self.curves]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        if high - low < 1e-6 * abs(high):  # one value: in the middle
            low, high = sorted((0.0, 2 * high))
        return _ticks(low, high or 1.0, 4)

    @property
    def matrix(self) -> tuple[float, ...]:
        """SVG's matrix from (step, value) to pixels: points are written as they were logged."""
        values = self.values
        across = (self.right - self.left) / self.last
        up = (self.top - self.bottom) / (values[-1] - values[0])
        return across, 0, 0, up, self.left, self.bottom - up * values[0]


def _ticks(low: float, high: float, parts: int, integer: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(parts, steps=[1, 2, 2.5, 5, 10], integer=integer)
    ticks = locator.tick_values(low, high)
    return [float(tick) for tick in ticks]


def charts(series: Mapping[str, Mapping[int, float]], last: int) -> list[Chart]:
    """Arrange all that was logged: `name` and `group/name` are charts, `group/name/…` their curves.

    A chart that is zero throughout says nothing and is left out.
    """
    groups: dict[str, dict[str, Points]] = {}
    for name in sorted(series, key=lambda name: "/" in name):  # of training, then of validation
        group, label = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
        groups.setdefault(group, {})[label] = sorted(series[name].items())
    return [
        Chart(_title(name), _curves(name, found), last)
        for name, found in groups.items()
        if any(value for points in found.values() for _, value in points)
    ]


def _title(name: str) -> str:
    return TITLES.get(name) or name.replace("_", " ").capitalize()


def _curves(name: str, found: Mapping[str, Points]) -> list[Curve]:
    curves = []
    for number, (label, points) in enumerate(found.items()):
        style = f"c{number % 6}"
        if name in SMOOTHED and len(points) > 20:
            curves.append(Curve("as logged", thinned(points), f"{style} {FAINT}"))
            label, points = "smoothed", smoothed(points)
        curves.append(Curve(label.replace("_", " "), thinned(points), style))
    return curves


def smoothed(points: Points) -> list[tuple[int, float]]:
    """Return exponential means, bias-corrected, over about a twentieth of the points."""
    decay = 1 - 20 / len(points)
    mean, weight, out = 0.0, 0.0, []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append((step, mean / weight))
    return out


def thinned(points: Points, limit: int = POINTS) -> list[tuple[int, float]]:
    """Return at most `limit` points: of each stretch the lowest and the highest."""
    if len(points) <= limit:
        return list(points)
    out: list[tuple[int, float]] = []
    size = math.ceil(2 * len(points) / limit)
    for start in range(0, len(points), size):
        stretch = sorted(points[start : start + size], key=lambda point: point[1])
        out += sorted({stretch[0], stretch[-1]})
    return out


class RunReport:
    """Writes the page of a run.

    `left_out`: pictures that are not in its data, each with the reason; the run's own files name
    further ones. `about`: what it runs on.
    """

    def __init__(
        self,
        config: TrainConfig,
        history: History,
        left_out: Sequence[str],
        about: Mapping[str, str],
    ) -> None:
        self.config, self.history, self.left_out, self.about = config, history, left_out, about
        self.folder = Path(config.output_dir)
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.filters |= {"duration": _duration, "value": _value}
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        self._template = environment.from_string(template)

    def write(self, step: int, state: str) -> None:
        """Write the page anew, or say in the log why that failed."""
        text = self._template.render(
            name=self.folder.resolve().name,
            state=state,
            step=step,
            steps=self.config.max_train_steps,
            seconds=self.history.seconds,
            left=self.history.seconds_left(step),
            written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
            charts=charts(self.history.series(), max(step, 1)),
            sheets=self._sheets(step),
            settings=_settings(self.config),
            left_out=self._left_out(),
            named=NAMED,
            about=self.about,
            themes={"light": LIGHT, "dark": DARK},
        )
        path = self.folder / FILE
        try:
            with atomic(path) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:  # a full disk must not end a training
            logger.error("'%s' could not be written: %s", path, error)

    def _sheets(self, step: int) -> list[tuple[int, str]]:
        """Return step and path of each contact sheet, newest first; those of an older try aside."""
        names = (path.name for path in (self.folder / SHEETS).glob("step-*.png"))
        found = [(int(match[1]), match[0]) for name in names if (match := _SHEET.fullmatch(name))]
        return [(at, f"{SHEETS}/{name}") for at, name in sorted(found, reverse=True) if at <= step]

    def _left_out(self) -> list[str]:
        files = sorted(self.folder.glob(BROKEN.format("*")))
        lines = (line for file in files for line in file.read_text("utf-8").splitlines())
        return [*dict.fromkeys([*self.left_out, *lines])]


def _settings(config: TrainConfig) -> dict[str, list[tuple[str, Any, Any]]]:
    """Return name, value and default of every option: what was given, then what was not."""
    found: dict[str, list[tuple[str, Any, Any]]] = {"given": [], "default": []}
    values = asdict(config)
    for field in sorted(fields(config), key=lambda field: field.name):
        value = values[field.name]
        default = "required" if field.default is MISSING else field.default
        given = field.default is MISSING or _value(value) != _value(default)
        found["given" if given else "default"].append((field.name, value, default))
    return found


def _value(value: Any) -> str:
    """Write a setting as it would stand in a YAML file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    return str(tqdm.format_interval(seconds))


def about(accelerator: Accelerator, precision: str) -> dict[str, str]:
    """Return what a run runs on: hardware, precision and versions."""
    device = accelerator.device
    name = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    found = {
        "device": f"{device.type}: {name}",
        "processes": str(accelerator.num_processes),
        "mixed_precision": precision,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
