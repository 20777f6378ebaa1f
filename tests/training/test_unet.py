"""Decoupled attention in the UNet that trains, against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

from ip_adapter_core.files import adapter_file
from ip_adapter_core.variants import FAMILIES
from tests.support import checkpoint_layouts as layouts
from tests.support import faces
from tests.support import small_models as small
from training.unet import attach, attention_inputs, cross_attention_layers, new_adapter

READS = {"base": small.EMBED, "plus": small.STATES, "full": small.STATES, "faceid": 512}


def inputs(unet, family):
    generator = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim
    made = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": torch.randn(2, 7, width, generator=generator),
        "added_cond_kwargs": {},
    }
    if family == "sdxl":
        made["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, small.POOLED, generator=generator),
            "time_ids": torch.rand(2, 6, generator=generator) * 64,
        }
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_without_images_it_is_diffusers_attention(family):
    unet = small.unet(family)
    given = inputs(unet, family)
    given["encoder_attention_mask"] = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    before = unet(**given).sample
    attach(unet)
    torch.testing.assert_close(unet(**given).sample, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", READS)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_images_it_is_diffusers_ip_adapter(family, variant):
    unet, theirs = small.unet(family), small.unet(family)
    given = inputs(unet, family)
    adapter = small.fill(new_adapter(unet, variant, READS[variant]), 4)
    pooled = variant in ("base", "faceid")
    shape = (2, READS[variant]) if pooled else (2, 257, READS[variant])
    features = torch.randn(shape, generator=torch.Generator().manual_seed(2))

    state: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        part, name = key.split(".", 1)
        state[part][name] = value
    theirs._load_ip_adapter_weights([state])
    faces.merge_lora(theirs, adapter.state_dict())
    read = torch.nn.functional.normalize(features, dim=-1) if variant == "faceid" else features
    added = {**given["added_cond_kwargs"], "image_embeds": [read[:, None]]}
    expected = theirs(**{**given, "added_cond_kwargs": added}).sample
    assert any(isinstance(p, IPAdapterAttnProcessor2_0) for p in theirs.attn_processors.values())

    attach(unet)
    plain = unet(**given).sample
    conditions = attention_inputs(adapter(features), adapter)
    found = unet(**given, cross_attention_kwargs=conditions).sample
    effect = (expected - plain).norm()
    assert effect > 0.01 * plain.norm()
    assert (found - expected).norm() < 1e-4 * effect


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_from_the_text_weights(family):
    unet = small.unet(family)
    adapter = new_adapter(unet, "base", small.EMBED)
    layers = cross_attention_layers(unet)
    assert [name.split("_block")[0] for name in layers] == ["down", "up", "up", "mid"]
    for mine, text in zip(adapter.ip_adapter.values(), layers.values(), strict=True):
        assert torch.equal(mine.to_k_ip.weight, text.to_k.weight)
        assert torch.equal(mine.to_v_ip.weight, text.to_v.weight)
        assert mine.to_k_ip.weight.data_ptr() != text.to_k.weight.data_ptr()


@pytest.mark.parametrize(
    "size, variant, feature_dim, keys_values, projection",
    [
        (layouts.SD15, "base", 1024, 19_169_280, 3.15),
        (layouts.SD15, "plus", 1280, 19_169_280, 29.92),
        (layouts.SD15, "full", 1280, 19_169_280, 2.63),
        (layouts.SD15, "faceid", 512, 19_169_280, 3.68),
        (layouts.SDXL, "base", 1280, 340_787_200, 10.50),
        (layouts.SDXL, "plus", 1280, 340_787_200, 82.96),
    ],
)
def test_sizes_are_the_published_ones(size, variant, feature_dim, keys_values, projection):
    """The paper's 22M: 19.17 and 3.15."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**size.diffusers_config())
        adapter = new_adapter(unet, variant, feature_dim)
    counts = {"_ip.": 0, "_lora.": 0, "image_proj.": 0}
    for name, parameter in adapter.named_parameters():
        counts[next(part for part in counts if part in name)] += parameter.numel()
    assert (counts["_ip."], round(counts["image_proj."] / 1e6, 2)) == (keys_values, projection)
    megabytes = counts["_lora."] * 2 / 1e6  # of the separate file, in half precision
    assert megabytes == (pytest.approx(51.1, abs=0.1) if variant == "faceid" else 0)


def test_a_smaller_query_network(tmp_path):
    """Its size is in the file, so that every loader finds it."""
    adapter = new_adapter(small.unet("sd15"), "plus", 48, resampler_dim=128, resampler_depth=2)
    sizes = adapter.spec.sizes
    assert (sizes["dim"], sizes["depth"], sizes["heads"]) == (128, 2, 2)
    adapter_file.save(adapter, tmp_path / "a.safetensors", {})
    assert adapter_file.load(tmp_path / "a.safetensors").spec == adapter.spec


def test_a_unet_without_cross_attention():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    with pytest.raises(ValueError, match="no cross-attention"):
        cross_attention_layers(unet)
