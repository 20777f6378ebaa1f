"""Weights of single layers and single latents."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..ip_adapter_core.comfyui.apply import curve_of
from ..ip_adapter_core.comfyui.host import schema
from ..ip_adapter_core.comfyui.layers import layers_of
from ..ip_adapter_core.comfyui.profile import draw_profile
from ..ip_adapter_core.latent_weights import MOST, weights_of
from ..ip_adapter_core.layer_weights import (
    LAYER_PRESETS,
    away_weights,
    edited,
    listed,
    preset_weights,
)
from ..ip_adapter_core.packing import SCALINGS, V_ONLY, LayerFolding
from . import types


class LayerWeights(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        about = " ".join(f"{name}: {preset.about}" for name, preset in LAYER_PRESETS.items())
        return schema(
            node_id="IPA_LayerWeights",
            display_name="Layer Weights",
            category="model/conditioning",
            search_aliases=["ip adapter layer weights", "style transfer", "composition", "style"],
            description=(
                "How much the image counts on each cross-attention layer: a preset, changed line "
                "by line where you like. Style transfer is a preset of this."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Tells which layers there are."),
                io.Combo.Input(
                    "preset", options=list(LAYER_PRESETS), default="uniform", tooltip=about
                ),
                io.String.Input(
                    "changes",
                    multiline=True,
                    default="",
                    tooltip="What differs from the preset, one per line: 'input 7: 0.5' for a "
                    "block, 'output 1.9: 0' for one layer of it, 'output: 0.2' for a side, "
                    "'all: 0'. Later lines win. The output 'layers' lists them all in this form.",
                ),
                io.Combo.Input(
                    "scaling",
                    options=list(SCALINGS),
                    default=V_ONLY,
                    optional=True,
                    tooltip="What the weight multiplies. V only: as in training, the image's part "
                    "grows with it. K+V: the image's keys too, so that weights above 1 follow "
                    "single tokens more sharply. w/ C penalty: less on narrow layers. K+mean(V): "
                    "the values' differences stay as they are.",
                ),
            ],
            outputs=[
                types.output(
                    types.LayerWeights,
                    "layer_weights",
                    "One multiplier per layer: for layer_weights of the Apply nodes.",
                ),
                types.output(
                    io.Image,
                    "profile",
                    "The weights as a picture, from the UNet's beginning to its end.",
                ),
                types.output(
                    io.String, "layers", "The weights as text, in the form that changes takes."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, preset: str, changes: str, scaling: str = V_ONLY) -> io.NodeOutput:
        layers = [layer.key for layer in layers_of(model)]
        weights = edited(preset_weights(preset, layers), layers, changes)
        away = away_weights(preset, layers)
        made: list[float] | LayerFolding = weights
        if any(away) or scaling != V_ONLY:
            against = tuple(a or weight for a, weight in zip(away, weights, strict=True))
            made = LayerFolding(tuple(weights), against, tuple(map(bool, away)), scaling)
        # What the negative side shows is drawn below zero.
        shown = [weight - a for weight, a in zip(weights, away, strict=True)]
        profile = draw_profile(shown, layers)
        shown_ui = ui.PreviewImage(profile, cls=cls)
        return io.NodeOutput(made, profile, listed(weights, layers), ui=shown_ui)


class LatentWeights(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_LatentWeights",
            display_name="Weights per Latent",
            category="model/conditioning",
            search_aliases=["ip adapter animation", "weight keyframes", "weights per frame"],
            description=(
                "A multiplier of the weight for each latent of a batch: frames of an animation, "
                "or several weights in one run."
            ),
            inputs=[
                io.String.Input(
                    "weights",
                    multiline=True,
                    default="0: 0, 15: 1",
                    tooltip="Keyframes 'number of the latent: weight', linear between them, or one "
                    "number per latent: '0, 0.5, 1'.",
                ),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=MOST,
                    tooltip="How many latents there are; 0 for as many as the weights name.",
                ),
                io.Custom("CURVE").Input(
                    "curve",
                    optional=True,
                    tooltip="Multiplies them, from the first latent on the left to the last on "
                    "the right: connect a Curve Editor.",
                    extra_dict={"forceInput": True},
                ),
            ],
            outputs=[
                types.output(
                    types.LatentWeights,
                    "latent_weights",
                    "One multiplier per latent: for latent_weights of the Apply nodes.",
                )
            ],
        )

    @classmethod
    def execute(cls, weights: str, count: int, curve: Any = None) -> io.NodeOutput:
        made = weights_of(weights, count)
        over = curve_of(curve, "curve")
        if over is not None:
            made = (over.to_lut(len(made)) * made).tolist()
        return io.NodeOutput(made)
