"""Nodes of ComfyUI_IPAdapter_plus that spread weights over frames. FLOAT outputs are lists."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...ip_adapter_core.ipadapter_plus.frames import (
    ORDERS,
    TIMINGS,
    Strategy,
    prompt_schedule,
    weights_over,
)
from . import inputs as of

_FRAMES = {"step": 1}


class IPAdapterWeights(of.Served):
    RETURN_TYPES = ("FLOAT", "FLOAT", "INT", "IMAGE", "IMAGE", "WEIGHTS_STRATEGY")
    RETURN_NAMES = (
        *("weights", "weights_invert", "total_frames", "image_1", "image_2"),
        "weights_strategy",
    )
    FUNCTION = "weights"
    CATEGORY = "ipadapter/weights"
    REQUIRED: ClassVar[of.Inputs] = {
        "weights": ("STRING", {"default": "1.0, 0.0", "multiline": True}),
        "timing": of.choice(*TIMINGS, default="linear"),
        "frames": of.whole(0, 0, 9999, **_FRAMES),
        "start_frame": of.whole(0, 0, 9999, **_FRAMES),
        "end_frame": of.whole(9999, 0, 9999, **_FRAMES),
        "add_starting_frames": of.whole(0, 0, 9999, **_FRAMES),
        "add_ending_frames": of.whole(0, 0, 9999, **_FRAMES),
        "method": of.choice(*ORDERS, default="full batch"),
    }
    OPTIONAL: ClassVar[of.Inputs] = {"image": of.IMAGE}

    def weights(
        self,
        weights: str = "",
        timing: str = "custom",
        frames: int = 0,
        start_frame: int = 0,
        end_frame: int = 9999,
        add_starting_frames: int = 0,
        add_ending_frames: int = 0,
        method: str = "full batch",
        weights_strategy: dict[str, Any] | None = None,
        image: Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        if weights_strategy is not None:
            strategy = Strategy(**weights_strategy)
        else:
            strategy = Strategy(
                weights=weights,
                timing=timing,
                frames=frames,
                start_frame=start_frame,
                end_frame=end_frame,
                add_starting_frames=add_starting_frames,
                add_ending_frames=add_ending_frames,
                method=method,
                frame_count=0 if image is None else len(image),
            )
        made, one, other = weights_over(strategy, image)
        return made, made[::-1], len(made), one, other, strategy.mapping()


class IPAdapterWeightsFromStrategy(IPAdapterWeights):
    REQUIRED: ClassVar[of.Inputs] = {"weights_strategy": of.STRATEGY}
    OPTIONAL: ClassVar[of.Inputs] = {"image": of.IMAGE}


class IPAdapterPromptScheduleFromWeightsStrategy(of.Served):
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("prompt_schedule",)
    FUNCTION = "prompt_schedule"
    CATEGORY = "ipadapter/weights"
    REQUIRED: ClassVar[of.Inputs] = {
        "weights_strategy": of.STRATEGY,
        "prompt": ("STRING", {"default": "", "multiline": True}),
    }

    def prompt_schedule(
        self, weights_strategy: dict[str, Any], prompt: str = "", **_: Any
    ) -> tuple[str]:
        return (prompt_schedule(Strategy(**weights_strategy), prompt),)


class IPAdapterCombineWeights(of.Served):
    RETURN_TYPES = ("FLOAT", "INT")
    RETURN_NAMES = ("weights", "count")
    FUNCTION = "combine"
    CATEGORY = "ipadapter/utils"
    REQUIRED: ClassVar[of.Inputs] = dict.fromkeys(
        ("weights_1", "weights_2"), of.number(0.0, 0.0, 1.0)
    )

    def combine(self, weights_1: Any, weights_2: Any, **_: Any) -> tuple[list[float], int]:
        lists = (x if isinstance(x, list) else [x] for x in (weights_1, weights_2))
        both = [weight for one in lists for weight in one]
        return both, len(both)
