"""What the Apply nodes refuse: values out of range, and parts that do not belong together."""

from __future__ import annotations

import pytest
import torch

NAN, INF = float("nan"), float("inf")


def broken_mask(value):
    mask = torch.ones(1, 8, 8)
    mask[0, 3, 3] = value
    return mask


@pytest.fixture(params=["model", "conditioning"])
def apply(request, small):
    def apply(model, adapter, images, **settings):
        if request.param == "model":
            return small.apply(model, adapter, images, **settings)
        texts = small.text(1), small.text(2)
        return small.apply_conditioning(model, *texts, adapter, images, **settings)

    return apply


def says(error, *words):
    missing = [word for word in words if str(word) not in str(error.value)]
    assert not missing, f"{error.value!s} does not say {missing}"


BAD = {
    "no mask": ({"mask": torch.ones(0, 8, 8)}, ["mask", "[0, 8, 8]", "[masks, height, width]"]),
    "mask without pixels": ({"mask": torch.ones(1, 0, 8)}, ["mask", "[1, 0, 8]"]),
    "a picture for a mask": ({"mask": torch.ones(1, 8, 8, 3)}, ["mask", "[1, 8, 8, 3]"]),
    "mask of one dimension": ({"mask": torch.ones(8)}, ["mask", "[8]", "height, width"]),
    "NaN in the mask": ({"mask": broken_mask(NAN)}, ["mask", "NaN", "0 … 1"]),
    "infinite mask": ({"mask": broken_mask(INF)}, ["mask", "infinite"]),
    "start after end": (
        {"start_at": 0.6, "end_at": 0.4},
        ["start_at", "0.6", "after", "end_at", "0.4"],
    ),
    "start NaN": ({"start_at": NAN}, ["start_at", "nan", "finite"]),
    "end NaN": ({"end_at": NAN}, ["end_at", "nan", "finite"]),
    "weight NaN": ({"weight": NAN}, ["weight", "nan", "finite"]),
    "15 layers": ({"layer_weights": [1.0] * 15}, ["layer_weights", "15", "16", "down, up, middle"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_the_reason(small, apply, case):
    settings, words = BAD[case]
    with pytest.raises(ValueError) as error:
        apply(small.model(), small.adapter(), small.images(), **settings)
    says(error, *words)


GOOD = {
    "negative weight": {"weight": -0.7},
    "large weight": {"weight": 5.0},
    "a window of one point": {"start_at": 0.5, "end_at": 0.5},
    "mask without a batch": {"mask": torch.ones(8, 8)},
    "mask of one pixel": {"mask": torch.full((1, 1, 1), 0.5)},
    "mask of one line": {"mask": torch.ones(1, 1, 4000)},
    "masks in float64": {"mask": torch.ones(2, 300, 7, dtype=torch.float64)},
    "mask above 1": {"mask": torch.full((1, 8, 8), 1.5)},
    "weights that are integers": {"layer_weights": (0, 1) * 8},
}


@pytest.mark.parametrize("case", GOOD)
def test_works(small, case):
    model, texts = small.model(), (small.text(1), small.text(2))
    patched = small.apply(model, small.adapter(), small.images(), **GOOD[case])
    found, bare = (small.run(small.guider(m, *texts), at=(0.5,)) for m in (patched, model))
    assert found.isfinite().all()
    assert not torch.allclose(found, bare, atol=1e-2)


@pytest.mark.parametrize("made_for, model", [("sd15", "sdxl"), ("sdxl", "sd15")])
def test_adapter_of_another_family(small, apply, made_for, model):
    with pytest.raises(ValueError) as error:
        apply(small.model(model), small.adapter(made_for), small.images())
    expected, found = (f"{len(small.LAYERS[f])} cross-attention" for f in (made_for, model))
    name = {"sd15": "BaseModel", "sdxl": "SDXL"}[model]
    says(error, "random.safetensors", expected, found, name)


def _flux2(models):
    config = {"image_model": "flux2", "in_channels": 8, "out_channels": 8, "patch_size": 1}
    config |= {"vec_in_dim": None, "context_in_dim": 8, "hidden_size": 32, "mlp_ratio": 3.0}
    config |= {"num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 4, 4, 4]}
    config |= {"theta": 2000, "qkv_bias": False, "guidance_embed": False, "ops_bias": False}
    config |= {"global_modulation": True, "mlp_silu_act": True, "txt_ids_dims": [3]}
    return models.Flux2, config


def _sd3(models):
    config = {"depth": 2, "in_channels": 16, "patch_size": 2, "adm_in_channels": 8}
    config |= {"input_size": None, "context_embedder_config": None, "num_patches": 16}
    return models.SD3, config


def _qwen_image(models):
    config = {"image_model": "qwen_image", "in_channels": 16, "num_layers": 1}
    config |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 8}
    return models.QwenImage, config | {"axes_dims_rope": (4, 6, 6)}


def _z_image(models):
    config = {"image_model": "lumina2", "patch_size": 2, "in_channels": 4, "dim": 32}
    config |= {"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    config |= {"cap_feat_dim": 8, "axes_dims": [4, 6, 6], "axes_lens": [8, 8, 8]}
    return models.ZImage, config


OTHERS = {"Flux2": _flux2, "SD3": _sd3, "QwenImage": _qwen_image, "ZImage": _z_image}


@pytest.fixture(params=OTHERS)
def other(small, request):
    """A model that no image prompt is for, and its name."""
    import comfy.supported_models as models
    from comfy.model_patcher import ModelPatcher

    kind, layout = OTHERS[request.param](models)
    config = kind(layout)
    config.unet_config = layout | {"dtype": torch.float32}
    with torch.device("meta"):
        made = config.get_model({}, device="meta")
    return ModelPatcher(made, load_device=small.CPU, offload_device=small.CPU), request.param


def test_a_model_that_no_adapter_is_for(nodes, folder, small, apply, flux, other):
    model, name = other
    for adapter, made_for in (
        (small.adapter(), "16 cross-attention layers"),
        *((flux.adapter(make()), "transformer blocks") for make in flux.FILES.values()),
    ):
        with pytest.raises(ValueError) as error:
            apply(model, adapter, flux.images(embed=adapter.spec.feature_dim))
        says(error, adapter.name, made_for, name, "SD1.5", "SDXL", "Flux.1")
    for node, given in (
        ("IPA_RecordAttention", ()),
        ("IPA_LayerWeights", ("uniform", "")),
        ("IPA_AutoLoad", ("standard",)),
    ):
        with pytest.raises(ValueError) as error:
            nodes[node].execute(model, *given)
        says(error, name, "no UNet cross-attention", "SD1.5", "SDXL", "Flux.1")


def test_adapters_and_models_of_other_families(small, apply, flux):
    for model, adapter, said in (
        (flux.model(), small.adapter(), ("Flux", "16 cross-attention layers")),
        (small.model(), flux.adapter(flux.xlabs()), ("BaseModel", "3 transformer blocks")),
        (small.model(), flux.adapter(flux.instantx()), ("BaseModel", "7 transformer blocks")),
        (
            flux.model(flux.Size(double=2)),
            flux.adapter(flux.xlabs()),
            ("Flux", "3 transformer blocks", "2 transformer blocks"),
        ),
    ):
        with pytest.raises(ValueError) as error:
            apply(model, adapter, flux.images(embed=adapter.spec.feature_dim))
        says(error, adapter.name, *said)


def test_images_of_another_encoder(small, apply):
    with pytest.raises(ValueError) as error:
        apply(small.model(), small.adapter(feature_dim=1024), small.images())
    says(error, "random.safetensors", 1024, "CLIP ViT-H/14", small.EMBED, "a random encoder")


def test_an_encoder_without_its_projection(small, apply, nodes, clip_vision):
    """The host gives the pooled state in its place, which can be as wide as an embedding."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import clip_vision_model

    encoder = clip_vision_model({**clip_vision.config, "projection_dim": small.HIDDEN})
    state = clip_vision.get_sd()
    encoder.load_sd({k: v for k, v in state.items() if k != "visual_projection.weight"})
    encode = nodes["IPA_EncodeImage"].execute
    (prompt,) = encode(encoder, torch.rand(1, 30, 30, 3), "center").args
    with pytest.raises(ValueError) as error:
        apply(small.model(), small.adapter(feature_dim=small.HIDDEN), prompt)
    says(error, "random.safetensors", "visual_projection.weight", "complete image encoder")


@pytest.mark.parametrize("kind", ["siglip2_vision_model", "dinov2", "dinov3"])
@pytest.mark.parametrize(
    "node, given", [("IPA_EncodeImage", ()), ("IPA_PrepareImage", (0.5, 0.5, 1))]
)
def test_an_encoder_of_another_kind(nodes, clip_vision, monkeypatch, kind, node, given):
    monkeypatch.setattr(clip_vision, "model_type", kind)
    with pytest.raises(ValueError) as error:
        nodes[node].execute(clip_vision, torch.rand(1, 30, 30, 3), "center", *given)
    says(error, kind, "expected a CLIP vision model")


def test_no_weight_leaves_prompts_of_the_node_before_in_force(small):
    """Two nodes side by side on one model, the sampler on the second's, whose λ becomes 0."""
    given = small.adapter(), small.images()
    _, *texts = small.apply_conditioning(small.model(), small.text(1), small.text(2), *given)
    first, *_ = small.apply_conditioning(small.model(), small.text(1), small.text(2), *given)
    model, *texts = small.apply_conditioning(small.model(), *texts, *given, weight=0.0)
    expected = small.run(small.guider(first, *texts))
    assert torch.equal(small.run(small.guider(model, *texts)), expected)


def test_a_conditioning_on_another_model(small):
    model, *texts = small.apply_conditioning(
        small.model(), small.text(1), small.text(2), small.adapter(), small.images()
    )
    with pytest.raises(RuntimeError) as error:
        small.run(small.guider(small.model(), *texts))
    says(error, "image prompt", "MODEL output", "Apply IP-Adapter (Conditioning)")
    other = small.apply(small.model("sdxl"), small.adapter("sdxl"), small.images())
    with pytest.raises(ValueError) as error:
        small.run(small.guider(other, *texts))
    says(error, "16 cross-attention layers", "has 17", "Apply the adapter to the model")
    assert small.run(small.guider(model, *texts)).isfinite().all()


def test_a_prompt_that_knows_no_black_picture(flux, nodes, caplog):
    """Saved before there was Flux: InstantX's stands against nothing, XLabs' is told of."""
    from dataclasses import replace

    known, given = flux.images(), {"cfg": 3.0, "at": (0.4,)}
    old = replace(known, black=None)
    instantx, xlabs = (flux.adapter(make()) for make in (flux.instantx, flux.xlabs))
    found, expected = (
        flux.sample(flux.small.apply(flux.model(), instantx, prompt), **given)
        for prompt in (old, known)
    )
    assert torch.equal(found, expected) and "black picture" not in caplog.text
    flux.small.apply(flux.model(), xlabs, old)
    assert "black picture" in caplog.text and "Encode the image again" in caplog.text
    caplog.clear()
    mine = replace(old, negative=replace(old.negative, image_embeds=torch.ones(1, flux.EMBED)))
    flux.small.apply(flux.model(), xlabs, mine)
    assert "black picture" not in caplog.text


def test_the_old_packs_nodes_on_a_transformer(flux):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import ipadapter_plus as old

    for call in (
        lambda: old.apply(flux.model(), None),
        lambda: old.find(flux.model(), None, None, None),
    ):
        with pytest.raises(ValueError, match=r"\(Flux\) is a transformer.*Apply IP-Adapter"):
            call()


def test_a_host_that_does_not_open_its_blocks(flux, monkeypatch):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import apply

    monkeypatch.setattr(apply, "FLUX_HOOKS", False)
    with pytest.raises(RuntimeError, match=r"flux\.safetensors.*does not open.*ComfyUI to 0\.17"):
        flux.small.apply(flux.model(), flux.adapter(flux.xlabs()), flux.images())
