"""Node ids of ComfyUI_IPAdapter_plus, for workflows and clients that were made for it.

Each is served where nobody else has it, so that the pack itself, or a fork, keeps its own.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from . import apply, embeds, first_version, loaders, params, pictures, weights
from .requests import FIRST_ENCODER
from .server import add_to_server
from .settings import serves_ids
from .texts import description

logger = logging.getLogger("comfyui_ip_adapter")
host_nodes: Any = importlib.import_module("nodes")  # ComfyUI's
DISPLAY_NAMES = {
    "IPAdapter": "IPAdapter",
    "IPAdapterAdvanced": "IPAdapter Advanced",
    "IPAdapterBatch": "IPAdapter Batch (Adv.)",
    "IPAdapterFaceID": "IPAdapter FaceID",
    "IPAdapterFaceIDKolors": "IPAdapter FaceID Kolors",
    "IPAAdapterFaceIDBatch": "IPAdapter FaceID Batch",
    "IPAdapterTiled": "IPAdapter Tiled",
    "IPAdapterTiledBatch": "IPAdapter Tiled Batch",
    "IPAdapterEmbeds": "IPAdapter Embeds",
    "IPAdapterEmbedsBatch": "IPAdapter Embeds Batch",
    "IPAdapterStyleComposition": "IPAdapter Style & Composition SDXL",
    "IPAdapterStyleCompositionBatch": "IPAdapter Style & Composition Batch SDXL",
    "IPAdapterMS": "IPAdapter Mad Scientist",
    "IPAdapterClipVisionEnhancer": "IPAdapter ClipVision Enhancer",
    "IPAdapterClipVisionEnhancerBatch": "IPAdapter ClipVision Enhancer Batch",
    "IPAdapterFromParams": "IPAdapter from Params",
    "IPAdapterPreciseStyleTransfer": "IPAdapter Precise Style Transfer",
    "IPAdapterPreciseStyleTransferBatch": "IPAdapter Precise Style Transfer Batch",
    "IPAdapterPreciseComposition": "IPAdapter Precise Composition",
    "IPAdapterPreciseCompositionBatch": "IPAdapter Precise Composition Batch",
    "IPAdapterUnifiedLoader": "IPAdapter Unified Loader",
    "IPAdapterUnifiedLoaderFaceID": "IPAdapter Unified Loader FaceID",
    "IPAdapterModelLoader": "IPAdapter Model Loader",
    "IPAdapterInsightFaceLoader": "IPAdapter InsightFace Loader",
    "IPAdapterUnifiedLoaderCommunity": "IPAdapter Unified Loader Community",
    "IPAdapterEncoder": "IPAdapter Encoder",
    "IPAdapterCombineEmbeds": "IPAdapter Combine Embeds",
    "IPAdapterNoise": "IPAdapter Noise",
    "PrepImageForClipVision": "Prep Image For ClipVision",
    "IPAdapterSaveEmbeds": "IPAdapter Save Embeds",
    "IPAdapterLoadEmbeds": "IPAdapter Load Embeds",
    "IPAdapterWeights": "IPAdapter Weights",
    "IPAdapterCombineWeights": "IPAdapter Combine Weights",
    "IPAdapterWeightsFromStrategy": "IPAdapter Weights From Strategy",
    "IPAdapterPromptScheduleFromWeightsStrategy": "Prompt Schedule From Weights Strategy",
    "IPAdapterRegionalConditioning": "IPAdapter Regional Conditioning",
    "IPAdapterCombineParams": "IPAdapter Combine Params",
    "IPAdapterApply": "Apply IPAdapter",
    "IPAdapterTilesMasked": "IPAdapter Masked Tiles (experimental)",
    "IPAdapterApplyFaceID": "Apply IPAdapter FaceID",
    "IPAdapterApplyEncoded": "Apply IPAdapter from Encoded",
    "IPAdapterBatchEmbeds": "IPAdapter Batch Embeds",
    "InsightFaceLoader": "Load InsightFace",
    "PrepImageForInsightFace": "Prepare Image For InsightFace",
    FIRST_ENCODER: "Encode IPAdapter Image",
}
_HOMES = apply, embeds, first_version, loaders, params, pictures, weights
CLASSES: dict[str, Any] = {
    id_: next(vars(home)[id_] for home in _HOMES if id_ in vars(home)) for id_ in DISPLAY_NAMES
}


def serve(module: str) -> dict[str, Any]:
    """Put the classes into ComfyUI's table where their id is free, and return those that it has.

    Args:
        module: What ComfyUI calls this pack, as it notes for the nodes that it loads itself.
    """
    add_to_server(served_now)
    if not serves_ids():
        return {}
    table, names = host_nodes.NODE_CLASS_MAPPINGS, host_nodes.NODE_DISPLAY_NAME_MAPPINGS
    for id_, kind in CLASSES.items():
        own = getattr(table.get(id_), "__module__", None) == kind.__module__
        if id_ not in table or own:
            kind.RELATIVE_PYTHON_MODULE = module
            kind.DESCRIPTION = description(id_)
            table[id_], names[id_] = kind, DISPLAY_NAMES[id_]
    served = served_now()
    if served:
        logger.info(
            "%d node ids of ComfyUI_IPAdapter_plus are served by this pack.%s",
            len(served),
            "" if len(served) == len(CLASSES) else " Another pack has the others.",
        )
    return served


def served_now() -> dict[str, Any]:
    """Return the classes of the ids that ComfyUI takes from this pack."""
    table = host_nodes.NODE_CLASS_MAPPINGS
    return {id_: kind for id_, kind in CLASSES.items() if table.get(id_) is kind}
