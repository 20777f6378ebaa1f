"""IPA_GridValues and IPA_DrawGrid."""

from __future__ import annotations

from collections import Counter
from itertools import product

from comfy_api.latest import io, ui
from torch import Tensor

from ..ip_adapter_core.comfyui.host import schema
from ..ip_adapter_core.contact_sheet import draw_grid
from ..ip_adapter_core.latent_weights import weights_of
from . import types

_SAME = "Connect the same output of Weights × Starts."


class GridValues(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_GridValues",
            display_name="Weights × Starts",
            category="model/conditioning",
            search_aliases=["ip adapter grid", "xy plot", "compare weights", "lambda grid"],
            description=(
                "Every weight with every start. Connect both to Apply IP-Adapter, which then runs "
                "once for each pair, and what follows too; Draw Grid lays the pictures side by "
                "side."
            ),
            inputs=[
                io.String.Input(
                    "weights",
                    default="0.25, 0.5, 0.75, 1",
                    tooltip="Weights (λ), one column each, left to right.",
                ),
                io.String.Input(
                    "starts",
                    default="0, 0.2, 0.4",
                    tooltip="Values of start_at, fractions of the schedule, one row each, top to "
                    "bottom.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "weight",
                    display_name="weight",
                    tooltip="One weight per pair: connect it to weight of Apply IP-Adapter and of "
                    "Draw Grid.",
                    is_output_list=True,
                ),
                io.Float.Output(
                    "start_at",
                    display_name="start_at",
                    tooltip="The start of each pair: connect it to start_at of Apply IP-Adapter "
                    "and of Draw Grid.",
                    is_output_list=True,
                ),
            ],
        )

    @classmethod
    def execute(cls, weights: str, starts: str) -> io.NodeOutput:
        rows = weights_of(starts, name="starts", limits=(0, 1))
        columns = weights_of(weights)
        for name, values in (("weights", columns), ("starts", rows)):
            _check_once(values, name)
        pairs = [(weight, start) for start in rows for weight in columns]
        return io.NodeOutput(*([*values] for values in zip(*pairs, strict=True)))


class DrawGrid(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_DrawGrid",
            display_name="Draw Grid",
            category="model/conditioning",
            search_aliases=["ip adapter grid", "xy plot", "contact sheet"],
            description="The pictures of Weights × Starts side by side, with their values.",
            inputs=[
                io.Image.Input(
                    "images", tooltip="One per pair, as they come; the first of each batch."
                ),
                io.Float.Input("weight", force_input=True, tooltip=_SAME),
                io.Float.Input("start_at", force_input=True, tooltip=_SAME),
            ],
            outputs=[
                io.Image.Output(
                    "grid",
                    display_name="grid",
                    tooltip="One picture of all of them, with their values.",
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], weight: list[float], start_at: list[float]
    ) -> io.NodeOutput:
        columns, rows = list(dict.fromkeys(weight)), list(dict.fromkeys(start_at))
        pairs = list(zip(weight, start_at, strict=False))
        lengths = {len(images), len(weight), len(start_at), len(columns) * len(rows)}
        if len(lengths) > 1 or set(pairs) != set(product(columns, rows)):
            raise ValueError(
                f"{len(images)} pictures do not fill a grid of {len(columns)} weights and "
                f"{len(rows)} starts. Connect both values from one Weights × Starts, to Apply "
                "IP-Adapter and to this, and the pictures that come of it."
            )
        cells = dict(zip(pairs, images, strict=True))
        grid = draw_grid(
            [[cells[w, s][0] for w in columns] for s in rows],
            [f"weight {round(w, 3):g}" for w in columns],
            [f"start {round(s, 3):g}" for s in rows],
        )
        return io.NodeOutput(grid, ui=ui.PreviewImage(grid, cls=cls))


def _check_once(values: list[float], name: str) -> None:
    twice = next((value for value, times in Counter(values).items() if times > 1), None)
    if twice is not None:
        raise ValueError(
            f"{name} has {twice:g} more than once: give each number once. (Decimals are written "
            "with a point: 0.25.)"
        )
