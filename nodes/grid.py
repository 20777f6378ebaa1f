"""IPA_GridValues and IPA_DrawGrid."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..ip_adapter_core.host.sheet import draw_grid
from ..ip_adapter_core.keyframes import weights_of


class GridValues(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
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
                    "weights", default="0.25, 0.5, 0.75, 1", tooltip="Weights (λ), from left."
                ),
                io.String.Input(
                    "starts",
                    default="0, 0.2, 0.4",
                    tooltip="Values of start_at, fractions of the schedule, from above.",
                ),
            ],
            outputs=[
                io.Float.Output("weight", display_name="weight", is_output_list=True),
                io.Float.Output("start_at", display_name="start_at", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, weights: str, starts: str) -> io.NodeOutput:
        rows, columns = weights_of(starts), weights_of(weights)
        odd = next((start for start in rows if not 0 <= start <= 1), None)
        if odd is not None:
            raise ValueError(
                f"starts has {odd:g}; expected fractions of the schedule, 0 its first step and 1 "
                "its end."
            )
        pairs = [(weight, start) for start in rows for weight in columns]
        return io.NodeOutput(*([*values] for values in zip(*pairs, strict=True)))


class DrawGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPA_DrawGrid",
            display_name="Draw Grid",
            category="model/conditioning",
            search_aliases=["ip adapter grid", "xy plot", "contact sheet"],
            description="The pictures of Weights × Starts side by side, with their values.",
            inputs=[
                io.Image.Input(
                    "images", tooltip="One a pair, as they come; the first of each batch."
                ),
                io.Float.Input("weight", force_input=True, tooltip="Of Weights × Starts."),
                io.Float.Input("start_at", force_input=True, tooltip="Of Weights × Starts."),
            ],
            outputs=[io.Image.Output("grid", display_name="grid")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], weight: list[float], start_at: list[float]
    ) -> io.NodeOutput:
        columns, rows = list(dict.fromkeys(weight)), list(dict.fromkeys(start_at))
        pairs = list(zip(weight, start_at, strict=True)) if len(weight) == len(start_at) else []
        if len(images) != len(pairs) or len(pairs) != len(columns) * len(rows):
            raise ValueError(
                f"{len(images)} pictures do not fill a grid of {len(columns)} weights and "
                f"{len(rows)} starts. Connect both values from one Weights × Starts, to Apply "
                "IP-Adapter and to this, and the pictures that come of it."
            )
        cells = dict(zip(pairs, images, strict=True))
        grid = draw_grid(
            [[cells[w, s][0] for w in columns] for s in rows],
            [f"weight {w:g}" for w in columns],
            [f"start {s:g}" for s in rows],
        )
        return io.NodeOutput(grid, ui=ui.PreviewImage(grid, cls=cls))
