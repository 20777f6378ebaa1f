"""What the editor is told: saved workflows and people depend on every word of it."""

from __future__ import annotations

import dataclasses

import pytest


def number(default, min_, max_, step):
    return "FLOAT", {"default": default, "min": min_, "max": max_, "step": step}


MODEL, PROMPT, CLIP, IMAGE = ("MODEL", {}), ("IMAGE_PROMPT", {}), ("CLIP_VISION", {}), ("IMAGE", {})
GROWING = ("COMFY_AUTOGROW_V3", {})
LINKED = ("FLOAT", {"forceInput": True})
WINDOW = {"start_at": number(0.0, 0.0, 1.0, 0.001), "end_at": number(1.0, 0.0, 1.0, 0.001)}
STRENGTH = {
    "weight": number(1.0, -5.0, 5.0, 0.05),
    **WINDOW,
    "combine": (["concat", "average", "per_latent"], {"default": "concat"}),
}
KNOBS = {"adapter": ("IP_ADAPTER", {}), "image_prompt": PROMPT, **STRENGTH}
CURVES = {"layer_weights": ("LAYER_WEIGHTS", {}), "weight_curve": ("CURVE", {"forceInput": True})}
OPTIONAL_KNOBS = {"mask": ("MASK", {}), **CURVES, "latent_weights": ("LATENT_WEIGHTS", {})}
LORA = {"lora_weight": ("FLOAT", {"default": 1.0, "min": -5.0, "max": 5.0, "step": 0.05})}
LAYER_PRESETS = [
    *("uniform", "style", "strong style", "composition", "style and composition"),
    *("style without composition", "ease in", "ease out", "ease in-out", "reverse in-out"),
    *("weak input", "weak middle", "weak output", "strong middle", "precise style"),
    *("precise composition", "away from composition", "away from style"),
]
SCALINGS = ["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
PRESETS = ["light", "standard", "fine-grained", "face", "full face", "composition", "bigG"]
PRESETS += ["faceid", "faceid-plus", "portrait"]
METHODS = ["concat", "average", "norm_average", "add", "subtract", "max", "min"]
NODES = {  # display names and outputs
    "IPA_LoadAdapter": ("Load IP-Adapter", {"adapter": "IP_ADAPTER"}),
    "IPA_LoadImageEncoder": ("Load Image Encoder (OpenCLIP)", {"clip_vision": "CLIP_VISION"}),
    "IPA_AutoLoad": (
        "Load IP-Adapter (Auto)",
        {"adapter": "IP_ADAPTER", "clip_vision": "CLIP_VISION", "chosen": "STRING"},
    ),
    "IPA_LoadFaceEncoder": ("Load Face Encoder", {"face_encoder": "FACE_ENCODER"}),
    "IPA_EncodeFace": (
        "Encode Face",
        {"image_prompt": "IMAGE_PROMPT", "crops": "IMAGE", "faces": "IMAGE"},
    ),
    "IPA_EncodeImage": ("Encode Image Prompt", {"image_prompt": "IMAGE_PROMPT"}),
    "IPA_PrepareImage": ("Prepare Image for Prompt", {"image": "IMAGE"}),
    "IPA_NegativeNoise": ("Negative Image Noise", {"image": "IMAGE"}),
    "IPA_CombinePrompts": ("Combine Image Prompts", {"image_prompt": "IMAGE_PROMPT"}),
    "IPA_SavePrompt": ("Save Image Prompt", {"image_prompt": "IMAGE_PROMPT"}),
    "IPA_LoadPrompt": ("Load Image Prompt", {"image_prompt": "IMAGE_PROMPT"}),
    "IPA_Apply": ("Apply IP-Adapter", {"model": "MODEL"}),
    "IPA_ApplyConditioning": (
        "Apply IP-Adapter (Conditioning)",
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"},
    ),
    "IPA_ApplyRegions": ("Apply IP-Adapter (Regions)", {"model": "MODEL"}),
    "IPA_LayerWeights": (
        "Layer Weights",
        {"layer_weights": "LAYER_WEIGHTS", "profile": "IMAGE", "layers": "STRING"},
    ),
    "IPA_LatentWeights": ("Weights per Latent", {"latent_weights": "LATENT_WEIGHTS"}),
    "IPA_RecordAttention": (
        "Record Image Attention",
        {"model": "MODEL", "record": "ATTENTION_RECORD"},
    ),
    "IPA_AttentionMap": ("Image Attention Map", {"overlay": "IMAGE", "heat_map": "MASK"}),
    "IPA_GridValues": ("Weights × Starts", {"weight": "FLOAT", "start_at": "FLOAT"}),
    "IPA_DrawGrid": ("Draw Grid", {"grid": "IMAGE"}),
}
REQUIRED = {  # inputs, in order
    "IPA_LoadAdapter": {"adapter_name": (["a.safetensors"], {})},
    "IPA_LoadImageEncoder": {"encoder_name": ([], {})},
    "IPA_AutoLoad": {"model": MODEL, "preset": (PRESETS, {"default": "standard"})},
    "IPA_EncodeImage": {
        "clip_vision": CLIP,
        "image": IMAGE,
        "crop": (["center", "pad", "none"], {"default": "center"}),
    },
    "IPA_PrepareImage": {
        "clip_vision": CLIP,
        "image": IMAGE,
        "crop": (["center", "pad", "none", "point", "tiles"], {"default": "center"}),
        "x": number(0.5, 0.0, 1.0, 0.01),
        "y": number(0.5, 0.0, 1.0, 0.01),
        "grid": ("INT", {"default": 1, "min": 1, "max": 4}),
    },
    "IPA_NegativeNoise": {
        "image": IMAGE,
        "kind": (["gaussian", "dissolve", "shuffle"], {"default": "gaussian"}),
        "strength": number(1.0, 0.0, 1.0, 0.01),
        "blur": number(0.0, 0.0, 32.0, 0.5),
        "seed": (
            "INT",
            {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True},
        ),
    },
    "IPA_CombinePrompts": {
        "prompts": GROWING,
        "method": (METHODS, {"default": "concat"}),
        "weights": ("STRING", {"default": ""}),
    },
    "IPA_SavePrompt": {
        "image_prompt": PROMPT,
        "filename_prefix": ("STRING", {"default": "image_prompts/prompt"}),
    },
    "IPA_LoadPrompt": {"prompt_name": (["image_prompts/a.safetensors [output]"], {})},
    "IPA_Apply": {"model": MODEL, **KNOBS},
    "IPA_ApplyConditioning": {
        "model": MODEL,
        "positive": ("CONDITIONING", {}),
        "negative": ("CONDITIONING", {}),
        **KNOBS,
    },
    "IPA_ApplyRegions": {
        "model": MODEL,
        "adapter": KNOBS["adapter"],
        "image_prompts": GROWING,
        "masks": GROWING,
        "overlap": (["normalize", "add"], {"default": "normalize"}),
        **STRENGTH,
    },
    "IPA_LoadFaceEncoder": {"encoder_name": ([], {})},
    "IPA_EncodeFace": {
        "order": (["largest", "left to right"], {"default": "largest"}),
        "number": ("INT", {"default": 1, "min": 1, "max": 64}),
        "several": (["side by side", "average"], {"default": "side by side"}),
        "structure": number(1.0, -1.0, 5.0, 0.05),
    },
    "IPA_LayerWeights": {
        "model": MODEL,
        "preset": (LAYER_PRESETS, {"default": "uniform"}),
        "changes": ("STRING", {"default": "", "multiline": True}),
    },
    "IPA_LatentWeights": {
        "weights": ("STRING", {"default": "0: 0, 15: 1", "multiline": True}),
        "count": ("INT", {"default": 0, "min": 0, "max": 100_000}),
    },
    "IPA_RecordAttention": {"model": MODEL},
    "IPA_AttentionMap": {
        "record": ("ATTENTION_RECORD", {}),
        "samples": ("LATENT", {}),
        "image": IMAGE,
        "blocks": ("STRING", {"default": "all"}),
        **WINDOW,
        "prompt_number": ("INT", {"default": 0, "min": 0, "max": 64}),
        "opacity": number(0.6, 0.0, 1.0, 0.05),
    },
    "IPA_GridValues": {
        "weights": ("STRING", {"default": "0.25, 0.5, 0.75, 1"}),
        "starts": ("STRING", {"default": "0, 0.2, 0.4"}),
    },
    "IPA_DrawGrid": {"images": IMAGE, "weight": LINKED, "start_at": LINKED},
}
OPTIONAL = {
    "IPA_EncodeImage": {"negative_image": IMAGE},
    "IPA_Apply": OPTIONAL_KNOBS | LORA,
    "IPA_ApplyConditioning": OPTIONAL_KNOBS | LORA,
    "IPA_ApplyRegions": CURVES | LORA,
    "IPA_EncodeFace": {
        "face_encoder": ("FACE_ENCODER", {}),
        "image": IMAGE,
        "clip_vision": ("CLIP_VISION", {}),
        "face_embeds": ("EMBEDS", {}),
    },
    "IPA_LayerWeights": {"scaling": (SCALINGS, {"default": "V only"})},
    "IPA_LatentWeights": {"curve": ("CURVE", {"forceInput": True})},
}
LOADERS = {"IPA_LoadAdapter", "IPA_LoadImageEncoder", "IPA_AutoLoad", "IPA_LoadFaceEncoder"}
# Those that a prompt may end in: they show or keep something.
ENDS = {
    *("IPA_PrepareImage", "IPA_SavePrompt", "IPA_LayerWeights", "IPA_AttentionMap"),
    *("IPA_DrawGrid", "IPA_EncodeFace"),
}


def test_ids(nodes):
    assert set(nodes) == set(NODES)


@pytest.fixture
def info(nodes, folder, prompts_folder):
    def info(node_id):
        (folder / "a.safetensors").touch()
        (prompts_folder / "a.safetensors").touch()
        return nodes[node_id].GET_NODE_INFO_V1()

    return info


@pytest.mark.parametrize("node_id", NODES)
def test_names_and_words_to_find_it_by(info, node_id):
    node = info(node_id)
    assert node["name"] == node_id
    category = "model/loaders" if node_id in LOADERS else "model/conditioning"
    assert (node["display_name"], node["category"]) == (NODES[node_id][0], category)
    from comfy_api.latest import io

    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:  # 0.11
        assert "ip adapter" in " ".join(node["search_aliases"])
        assert len(node["search_aliases"]) >= 3
    assert node["description"].endswith(".")
    assert not node["experimental"] and not node["deprecated"]
    assert node["output_node"] == (node_id in ENDS)


@pytest.mark.parametrize("node_id", NODES)
@pytest.mark.parametrize("kind", ["required", "optional"])
def test_inputs(info, node_id, kind):
    found = info(node_id)["input"].get(kind, {})
    expected = {"required": REQUIRED, "optional": OPTIONAL}[kind].get(node_id, {})
    assert list(found) == list(expected)
    for name, (type_, limits) in expected.items():
        # A choice comes as ("COMBO", {"options": [...]}).
        given_type, options = found[name]
        assert (options["options"] if isinstance(type_, list) else given_type) == type_, name
        assert {key: options.get(key) for key in limits} == limits, name
        assert len(options.get("tooltip") or "") > 10, f"{name} has no tooltip"


@pytest.mark.parametrize("node_id", NODES)
def test_outputs(info, node_id):
    node = info(node_id)
    assert dict(zip(node["output_name"], node["output"], strict=True)) == NODES[node_id][1]
    for name, tooltip in zip(node["output_name"], node["output_tooltips"], strict=True):
        assert len(tooltip or "") > 10, f"{name} has no tooltip"


@pytest.mark.parametrize(
    "node_id, list_, entry, entry_type",
    [
        ("IPA_CombinePrompts", "prompts", "prompt", "IMAGE_PROMPT"),
        ("IPA_ApplyRegions", "image_prompts", "image_prompt", "IMAGE_PROMPT"),
        ("IPA_ApplyRegions", "masks", "mask", "MASK"),
    ],
)
def test_a_list_grows_from_one_and_its_entries_say_what_they_are(
    info, node_id, list_, entry, entry_type
):
    template = info(node_id)["input"]["required"][list_][1]["template"]
    assert (template["prefix"], template["min"]) == (entry, 1)
    ((name, (type_, options)),) = template["input"]["required"].items()
    assert (name, type_) == (entry, entry_type)
    assert len(options.get("tooltip") or "") > 10
