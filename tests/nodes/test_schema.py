"""What the editor is told: saved workflows and people depend on every word of it."""

from __future__ import annotations

import pytest

KNOBS = {
    "adapter": ("IP_ADAPTER", {}),
    "image_prompt": ("IMAGE_PROMPT", {}),
    "weight": ("FLOAT", {"default": 1.0, "min": -5.0, "max": 5.0, "step": 0.05}),
    "start_at": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001}),
    "end_at": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.001}),
    "combine": (["concat", "average", "per_latent"], {"default": "concat"}),
}
OPTIONAL_KNOBS = {
    "mask": ("MASK", {}),
    "layer_weights": ("LAYER_WEIGHTS", {}),
    "weight_curve": ("CURVE", {"forceInput": True}),
    "latent_weights": ("LATENT_WEIGHTS", {}),
}
PRESETS = [
    *("uniform", "style", "strong style", "composition", "style and composition"),
    *("style without composition", "ease in", "ease out", "ease in-out", "reverse in-out"),
    *("weak input", "weak middle", "weak output", "strong middle"),
]
# id: display name, category, required and optional inputs in order, outputs
NODES = {
    "IPA_LoadAdapter": (
        "Load IP-Adapter",
        "model/loaders",
        {"adapter_name": (["a.safetensors"], {})},
        {},
        {"adapter": "IP_ADAPTER"},
    ),
    "IPA_EncodeImage": (
        "Encode Image Prompt",
        "model/conditioning",
        {
            "clip_vision": ("CLIP_VISION", {}),
            "image": ("IMAGE", {}),
            "crop": (["center", "pad", "none"], {"default": "center"}),
        },
        {"negative_image": ("IMAGE", {})},
        {"image_prompt": "IMAGE_PROMPT"},
    ),
    "IPA_Apply": (
        "Apply IP-Adapter",
        "model/conditioning",
        {"model": ("MODEL", {}), **KNOBS},
        OPTIONAL_KNOBS,
        {"model": "MODEL"},
    ),
    "IPA_ApplyConditioning": (
        "Apply IP-Adapter (Conditioning)",
        "model/conditioning",
        {
            "model": ("MODEL", {}),
            "positive": ("CONDITIONING", {}),
            "negative": ("CONDITIONING", {}),
            **KNOBS,
        },
        OPTIONAL_KNOBS,
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"},
    ),
    "IPA_ApplyRegions": (
        "Apply IP-Adapter (Regions)",
        "model/conditioning",
        {
            "model": ("MODEL", {}),
            "adapter": KNOBS["adapter"],
            "image_prompts": ("COMFY_AUTOGROW_V3", {}),
            "masks": ("COMFY_AUTOGROW_V3", {}),
            "overlap": (["normalize", "add"], {"default": "normalize"}),
            **{name: KNOBS[name] for name in ("weight", "start_at", "end_at", "combine")},
        },
        {name: OPTIONAL_KNOBS[name] for name in ("layer_weights", "weight_curve")},
        {"model": "MODEL"},
    ),
    "IPA_LayerWeights": (
        "Layer Weights",
        "model/conditioning",
        {
            "model": ("MODEL", {}),
            "preset": (PRESETS, {"default": "uniform"}),
            "changes": ("STRING", {"default": "", "multiline": True}),
        },
        {},
        {"layer_weights": "LAYER_WEIGHTS", "profile": "IMAGE", "layers": "STRING"},
    ),
    "IPA_LatentWeights": (
        "Weights per Latent",
        "model/conditioning",
        {
            "weights": ("STRING", {"default": "0: 0, 15: 1", "multiline": True}),
            "count": ("INT", {"default": 0, "min": 0, "max": 100_000}),
        },
        {"curve": ("CURVE", {"forceInput": True})},
        {"latent_weights": "LATENT_WEIGHTS"},
    ),
    "IPA_RecordAttention": (
        "Record Image Attention",
        "model/conditioning",
        {"model": ("MODEL", {})},
        {},
        {"model": "MODEL", "record": "ATTENTION_RECORD"},
    ),
    "IPA_AttentionMap": (
        "Image Attention Map",
        "model/conditioning",
        {
            "record": ("ATTENTION_RECORD", {}),
            "samples": ("LATENT", {}),
            "image": ("IMAGE", {}),
            "blocks": ("STRING", {"default": "all"}),
            "start_at": KNOBS["start_at"],
            "end_at": KNOBS["end_at"],
            "prompt_number": ("INT", {"default": 0, "min": 0, "max": 64}),
            "opacity": ("FLOAT", {"default": 0.6, "min": 0.0, "max": 1.0, "step": 0.05}),
        },
        {},
        {"overlay": "IMAGE", "heat_map": "MASK"},
    ),
    "IPA_GridValues": (
        "Weights × Starts",
        "model/conditioning",
        {
            "weights": ("STRING", {"default": "0.25, 0.5, 0.75, 1"}),
            "starts": ("STRING", {"default": "0, 0.2, 0.4"}),
        },
        {},
        {"weight": "FLOAT", "start_at": "FLOAT"},
    ),
    "IPA_DrawGrid": (
        "Draw Grid",
        "model/conditioning",
        {
            "images": ("IMAGE", {}),
            "weight": ("FLOAT", {"forceInput": True}),
            "start_at": ("FLOAT", {"forceInput": True}),
        },
        {},
        {"grid": "IMAGE"},
    ),
    "IPA_LoadImageEncoder": (
        "Load Image Encoder (OpenCLIP)",
        "model/loaders",
        {"encoder_name": ([], {})},
        {},
        {"clip_vision": "CLIP_VISION"},
    ),
    "IPA_AutoLoad": (
        "Load IP-Adapter (Auto)",
        "model/loaders",
        {
            "model": ("MODEL", {}),
            "preset": (
                ["light", "standard", "fine-grained", "face", "full face"],
                {"default": "standard"},
            ),
        },
        {},
        {"adapter": "IP_ADAPTER", "clip_vision": "CLIP_VISION", "chosen": "STRING"},
    ),
    "IPA_PrepareImage": (
        "Prepare Image for Prompt",
        "model/conditioning",
        {
            "clip_vision": ("CLIP_VISION", {}),
            "image": ("IMAGE", {}),
            "crop": (["center", "pad", "none", "point", "tiles"], {"default": "center"}),
            "x": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}),
            "y": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}),
            "grid": ("INT", {"default": 1, "min": 1, "max": 4}),
        },
        {},
        {"image": "IMAGE"},
    ),
    "IPA_NegativeNoise": (
        "Negative Image Noise",
        "model/conditioning",
        {
            "image": ("IMAGE", {}),
            "kind": (["gaussian", "dissolve", "shuffle"], {"default": "gaussian"}),
            "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            "blur": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 32.0, "step": 0.5}),
            "seed": (
                "INT",
                {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True},
            ),
        },
        {},
        {"image": "IMAGE"},
    ),
    "IPA_CombinePrompts": (
        "Combine Image Prompts",
        "model/conditioning",
        {
            "prompts": ("COMFY_AUTOGROW_V3", {}),
            "method": (
                ["concat", "average", "norm_average", "add", "subtract"],
                {"default": "concat"},
            ),
            "weights": ("STRING", {"default": ""}),
        },
        {},
        {"image_prompt": "IMAGE_PROMPT"},
    ),
    "IPA_SavePrompt": (
        "Save Image Prompt",
        "model/conditioning",
        {
            "image_prompt": ("IMAGE_PROMPT", {}),
            "filename_prefix": ("STRING", {"default": "image_prompts/prompt"}),
        },
        {},
        {"image_prompt": "IMAGE_PROMPT"},
    ),
    "IPA_LoadPrompt": (
        "Load Image Prompt",
        "model/conditioning",
        {"prompt_name": (["image_prompts/a.safetensors [output]"], {})},
        {},
        {"image_prompt": "IMAGE_PROMPT"},
    ),
}
# Those that a prompt may end in: they show or keep something.
ENDS = {
    *("IPA_PrepareImage", "IPA_SavePrompt", "IPA_LayerWeights", "IPA_AttentionMap"),
    "IPA_DrawGrid",
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
    assert (node["display_name"], node["category"]) == NODES[node_id][:2]
    assert "ip adapter" in " ".join(node["search_aliases"])
    assert len(node["search_aliases"]) >= 3
    assert node["description"].endswith(".")
    assert not node["experimental"] and not node["deprecated"]
    assert node["output_node"] == (node_id in ENDS)


@pytest.mark.parametrize("node_id", NODES)
@pytest.mark.parametrize("kind", ["required", "optional"])
def test_inputs(info, node_id, kind):
    found = info(node_id)["input"].get(kind, {})
    expected = NODES[node_id][2 if kind == "required" else 3]
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
    assert dict(zip(node["output_name"], node["output"], strict=True)) == NODES[node_id][4]
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
