"""IPA_ApplyRegions."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ip_adapter_core.host.compile import Settings, compile_prompt
from ..ip_adapter_core.host.patch import apply_to_model
from ..ip_adapter_core.regions import OVERLAPS, share_out
from . import apply, types

_MOST = 32  # regions


class ApplyIPAdapterRegions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        knobs = {knob.id: knob for knob in apply.settings()}
        names = "weight", "start_at", "end_at", "combine", "layer_weights", "weight_curve"
        return io.Schema(
            node_id="IPA_ApplyRegions",
            display_name="Apply IP-Adapter (Regions)",
            category="model/conditioning",
            search_aliases=["ip adapter", "regional image prompt", "image prompt mask", "regions"],
            description="Several pictures in one model, each in the region of its own mask.",
            inputs=[
                io.Model.Input("model", tooltip="Stays as it is."),
                knobs["adapter"],
                io.Autogrow.Input(
                    "image_prompts",
                    template=io.Autogrow.TemplatePrefix(
                        types.ImagePrompt.Input("image_prompt"), "image_prompt", 1, _MOST
                    ),
                    tooltip="One a region.",
                ),
                io.Autogrow.Input(
                    "masks",
                    template=io.Autogrow.TemplatePrefix(io.Mask.Input("mask"), "mask", 1, _MOST),
                    tooltip="Where each image prompt acts, in their order, of any sizes. One image "
                    "prompt more than masks: the last one gets what the masks leave free.",
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(OVERLAPS),
                    default="normalize",
                    tooltip="Where masks overlap: normalize lets the regions share, so that none "
                    "counts more than the weight; add adds them up.",
                ),
                *(knobs[name] for name in names),
            ],
            outputs=[io.Model.Output("model", display_name="model")],
        )

    @classmethod
    def execute(
        cls, model: Any, image_prompts: Any, masks: Any, overlap: str, **settings: Any
    ) -> io.NodeOutput:
        prompts, given = ([*types.in_order(x).values()] for x in (image_prompts, masks))
        if len(prompts) - len(given) not in (0, 1):
            raise ValueError(
                f"{len(prompts)} image prompts do not go with {len(given)} masks: give one mask "
                "for each, or one mask less, then the last image prompt gets what the masks leave "
                "free."
            )
        for mask in given:
            Settings.check_mask(mask)
        shares = share_out(given, overlap, rest=len(prompts) > len(given))
        for prompt, mask in zip(prompts, shares, strict=True):
            regional = Settings(image_prompt=prompt, mask=mask, **settings)
            compiled = compile_prompt(model, regional)
            model = model if compiled is None else apply_to_model(model, *compiled)
        return io.NodeOutput(model)
