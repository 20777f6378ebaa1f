"""IPA_ApplyRegions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from comfy_api.latest import io

from ..ip_adapter_core.comfyui.apply import Settings, compile_prompts, curve_of, warn_of_black
from ..ip_adapter_core.comfyui.sampling import apply_to_model
from ..ip_adapter_core.region_masks import OVERLAPS, share_out
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
                io.Model.Input("model", tooltip=types.PATCHED),
                knobs["adapter"],
                io.Autogrow.Input(
                    "image_prompts",
                    template=io.Autogrow.TemplatePrefix(
                        types.ImagePrompt.Input(
                            "image_prompt",
                            tooltip="Made with the image encoder that the adapter was trained "
                            "with.",
                        ),
                        "image_prompt",
                        1,
                        _MOST,
                    ),
                    tooltip="One per region.",
                ),
                io.Autogrow.Input(
                    "masks",
                    template=io.Autogrow.TemplatePrefix(
                        io.Mask.Input("mask", tooltip="White where the image acts."),
                        "mask",
                        1,
                        _MOST,
                    ),
                    tooltip="Where each image prompt acts, in their order, of any sizes. One image "
                    "prompt more than masks: the last one gets what the masks leave free.",
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(OVERLAPS),
                    default="normalize",
                    tooltip="Where masks overlap: normalize lets the regions share, so that "
                    "together they count no more than the weight; add adds them up.",
                ),
                *(knobs[name] for name in names),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="The model that follows all of the pictures: for the sampler, or a "
                    "further Apply node.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, image_prompts: Any, masks: Any, overlap: str, **settings: Any
    ) -> io.NodeOutput:
        prompts, given = types.by_number(image_prompts), types.by_number(masks)
        _check_paired(prompts.keys(), given.keys())
        for number, mask in given.items():
            Settings.check_mask(mask)
            warn_of_black(mask, f"mask{number}")
        shares = share_out([*given.values()], overlap, rest=len(prompts) > len(given))
        shared = {**settings, "weight_curve": curve_of(settings.get("weight_curve"))}
        regions = [
            Settings(image_prompt=prompt, mask=mask, **shared)
            for prompt, mask in zip(prompts.values(), shares, strict=True)
        ]
        for sides in compile_prompts(model, regions):
            model = apply_to_model(model, *sides)
        return io.NodeOutput(model)


def _check_paired(prompts: Collection[int], masks: Collection[int]) -> None:
    """Raise ValueError unless every prompt but the last has the mask of its number, and every mask
    a prompt."""
    lacking = [f"mask{n}" for n in prompts if n not in masks and n != max(prompts)]
    lacking += [f"image_prompt{n}" for n in masks if n not in prompts]
    if lacking or not masks:
        raise ValueError(
            f"{len(prompts)} image prompts do not go with {len(masks)} masks: nothing comes in at "
            f"{', '.join(lacking) or 'masks'}. Give every image prompt the mask of its number; "
            "only the last may have none, and gets what the masks leave free."
        )
