"""What each served node does, and what to take in its place: shown on it, and its help page."""

from __future__ import annotations

_APPLY = "*Encode Image Prompt*, then *Apply IP-Adapter*"
_PER_LATENT = f"{_APPLY} with `per_latent`"
_SAVED = "other files: they do not carry over"

TEXTS = {
    "IPAdapter": ("Makes a model follow a picture, with a loader's own image encoder.", _APPLY),
    "IPAdapterAdvanced": (
        "Makes a model follow pictures, by a weight type and a scaling.",
        f"{_APPLY}; *Layer Weights* for weight types and scalings",
    ),
    "IPAdapterBatch": (
        "The same, picture i for latent i; the last one for all that follow.",
        _PER_LATENT,
    ),
    "IPAdapterFaceID": ("Makes a model follow a face.", "*Encode Face*, then *Apply IP-Adapter*"),
    "IPAdapterFaceIDKolors": (
        "Makes a Kolors model follow a face; its adapter is refused by name.",
        "",
    ),
    "IPAAdapterFaceIDBatch": (
        "Makes a model follow a face a latent.",
        "*Encode Face* and `per_latent`",
    ),
    "IPAdapterTiled": (
        "Cuts a picture into squares, each of which acts in its own place.",
        "*Prepare Image for Prompt*, tiles, where all may act everywhere; *Apply IP-Adapter "
        "(Regions)* with a mask for each",
    ),
    "IPAdapterTiledBatch": (
        "The same, picture i for latent i.",
        "*Apply IP-Adapter (Regions)* with `per_latent`",
    ),
    "IPAdapterEmbeds": (
        "Makes a model follow features that an Encoder gave.",
        "*Apply IP-Adapter*: an image prompt is a value there",
    ),
    "IPAdapterEmbedsBatch": ("The same, image i for latent i.", _PER_LATENT),
    "IPAdapterStyleComposition": (
        "The style of one picture and the composition of another.",
        "two *Apply IP-Adapter*, with the *Layer Weights* `style` and `composition`",
    ),
    "IPAdapterStyleCompositionBatch": (
        "The same, picture i for latent i.",
        "two *Apply IP-Adapter* with `per_latent`, with `style` and `composition`",
    ),
    "IPAdapterMS": (
        "A weight for each numbered block, as text: '3:0.8, 6:0.35'; the others get 0.",
        "*Layer Weights*, whose lines name the layers",
    ),
    "IPAdapterClipVisionEnhancer": (
        "Follows a picture and, averaged, its pieces, for finer details.",
        "*Prepare Image for Prompt*, tiles with a grid, and `average`",
    ),
    "IPAdapterClipVisionEnhancerBatch": (
        "The same, picture i for latent i.",
        "*Prepare Image for Prompt*",
    ),
    "IPAdapterFromParams": (
        "Applies the pictures that Regional Conditionings gathered, one after the other.",
        "*Apply IP-Adapter (Regions)*, or *(Conditioning)* with a text for each",
    ),
    "IPAdapterPreciseStyleTransfer": (
        "The style; the composition is shown to the negative side, times style_boost.",
        "*Layer Weights*, `precise style`",
    ),
    "IPAdapterPreciseStyleTransferBatch": (
        "The same, picture i for latent i.",
        "*Layer Weights*, `precise style`, and `per_latent`",
    ),
    "IPAdapterPreciseComposition": (
        "The composition; the style is shown to the negative side, times composition_boost.",
        "*Layer Weights*, `precise composition`",
    ),
    "IPAdapterPreciseCompositionBatch": (
        "The same, picture i for latent i.",
        "*Layer Weights*, `precise composition`, and `per_latent`",
    ),
    "IPAdapterUnifiedLoader": (
        "Finds adapter and image encoder for a preset, by their names, else by what is in the "
        "files.",
        "*Load IP-Adapter (Auto)*",
    ),
    "IPAdapterUnifiedLoaderFaceID": (
        "Finds a face adapter for a preset.",
        "*Load IP-Adapter (Auto)*, `faceid` and its kin",
    ),
    "IPAdapterModelLoader": ("Reads an adapter from models/ipadapter.", "*Load IP-Adapter*"),
    "IPAdapterInsightFaceLoader": ("Loads what finds and describes faces.", "*Load Face Encoder*"),
    "IPAdapterUnifiedLoaderCommunity": (
        "Finds the composition adapter.",
        "*Load IP-Adapter (Auto)*, `composition`",
    ),
    "IPAdapterEncoder": (
        "Turns pictures into features, times a weight; a mask covers parts of them.",
        "*Encode Image Prompt*; weights are *Combine Image Prompts*'",
    ),
    "IPAdapterCombineEmbeds": (
        "Joins features, or calculates with them.",
        "*Combine Image Prompts*",
    ),
    "IPAdapterNoise": ("Makes noise of a picture.", "*Negative Image Noise*, another noise"),
    "PrepImageForClipVision": (
        "Cuts a square of 224 pixels out of a picture, and sharpens it.",
        "*Prepare Image for Prompt*",
    ),
    "IPAdapterSaveEmbeds": (
        "Writes features into the output folder; never over another file.",
        f"*Save Image Prompt*, {_SAVED}",
    ),
    "IPAdapterLoadEmbeds": (
        "Reads saved features from the input folder.",
        f"*Load Image Prompt*, {_SAVED}",
    ),
    "IPAdapterWeights": (
        "Weights over frames, and the pictures that they fade between.",
        "*Weights per Latent*",
    ),
    "IPAdapterCombineWeights": ("Joins two lists of weights.", "*Weights per Latent*"),
    "IPAdapterWeightsFromStrategy": (
        "Weights over frames, as another node has them.",
        "*Weights per Latent*",
    ),
    "IPAdapterPromptScheduleFromWeightsStrategy": (
        "A text for each picture, by the frame at which it begins.",
        "",
    ),
    "IPAdapterRegionalConditioning": (
        "A picture and its region, for IPAdapter from Params, and texts with the same mask.",
        "*Apply IP-Adapter (Conditioning)*",
    ),
    "IPAdapterCombineParams": (
        "Joins regions for IPAdapter from Params.",
        "*Apply IP-Adapter (Regions)*",
    ),
    "IPAdapterApply": (
        "Makes a model follow pictures: the node of before 2024-03-23.",
        f"{_APPLY}; `weight_type` is the scaling of *Layer Weights*",
    ),
    "IPAdapterTilesMasked": (
        "Cuts a picture into tiles with a mask each (before 2024-03-23).",
        "*Apply IP-Adapter (Regions)*",
    ),
    "IPAdapterApplyFaceID": ("Makes a model follow a face (before 2024-03-23).", ""),
    "IPAdapterApplyEncoded": (
        "Makes a model follow encoded pictures (before 2024-03-23).",
        "*Apply IP-Adapter*",
    ),
    "IPAdapterBatchEmbeds": ("Joins encoded pictures.", "*Combine Image Prompts*"),
    "InsightFaceLoader": ("Loads what finds and describes faces (before 2024-03-23).", ""),
    "PrepImageForInsightFace": (
        "Cuts a square of 640 pixels out of a picture (before 2024-03-23).",
        "",
    ),
    "IPAdapterEncoderOfFirstVersion": (
        "Turns up to four pictures into features (IPAdapter Encoder before 2024-03-23).",
        "*Encode Image Prompt*, *Combine Image Prompts*",
    ),
}


def description(id_: str) -> str:
    """Return both as one paragraph."""
    does, native = TEXTS[id_]
    instead = f" This pack's own: {native}." if native else ""
    return f"{does}{instead} (A node of ComfyUI_IPAdapter_plus.)"
