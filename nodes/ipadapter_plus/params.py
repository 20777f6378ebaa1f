"""Nodes of ComfyUI_IPAdapter_plus that gather regions for *IPAdapter from Params*."""

from __future__ import annotations

from typing import Any, ClassVar

import node_helpers
from torch import Tensor

from . import inputs as of


class IPAdapterRegionalConditioning(of.Served):
    RETURN_TYPES = ("IPADAPTER_PARAMS", "CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("IPADAPTER_PARAMS", "POSITIVE", "NEGATIVE")
    FUNCTION = "conditioning"
    CATEGORY = "ipadapter/params"
    REQUIRED: ClassVar[of.Inputs] = {
        "image": of.IMAGE,
        "image_weight": of.number(1.0, -1.0, 3.0),
        "prompt_weight": of.number(1.0, 0.0, 10.0),
        "weight_type": of.WEIGHT_TYPE,
        **of.FRACTIONS,
    }
    OPTIONAL: ClassVar[of.Inputs] = {
        "mask": of.MASK,
        "positive": of.CONDITIONING,
        "negative": of.CONDITIONING,
    }

    def conditioning(
        self,
        image: Tensor | None,
        image_weight: float,
        prompt_weight: float,
        weight_type: str,
        start_at: float = 0.0,
        end_at: float = 1.0,
        mask: Tensor | None = None,
        positive: Any = None,
        negative: Any = None,
        **_: Any,
    ) -> tuple[dict[str, list[Any]], Any, Any]:
        if mask is not None:
            values = {"mask": mask, "set_area_to_bounds": False, "mask_strength": prompt_weight}
            positive, negative = (
                given and node_helpers.conditioning_set_values(given, values)
                for given in (positive, negative)
            )
        params: dict[str, list[Any]] = {
            "image": [image],
            "attn_mask": [mask],
            "weight": [image_weight],
            "weight_type": [weight_type],
            "start_at": [start_at],
            "end_at": [end_at],
        }
        return params, positive, negative


class IPAdapterCombineParams(of.Served):
    RETURN_TYPES = ("IPADAPTER_PARAMS",)
    FUNCTION = "combine"
    CATEGORY = "ipadapter/params"
    REQUIRED: ClassVar[of.Inputs] = {"params_1": of.PARAMS, "params_2": of.PARAMS}
    OPTIONAL: ClassVar[of.Inputs] = {f"params_{number}": of.PARAMS for number in range(3, 6)}

    def combine(
        self,
        params_1: dict[str, list[Any]],
        params_2: dict[str, list[Any]],
        params_3: dict[str, list[Any]] | None = None,
        params_4: dict[str, list[Any]] | None = None,
        params_5: dict[str, list[Any]] | None = None,
        **_: Any,
    ) -> tuple[dict[str, list[Any]]]:
        given = [x for x in (params_1, params_2, params_3, params_4, params_5) if x is not None]
        return ({name: [x for params in given for x in params[name]] for name in params_1},)
