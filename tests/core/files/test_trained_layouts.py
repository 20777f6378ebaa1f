"""Adapters as trainers leave them: the reference's checkpoints, UNets of diffusers, parts."""

from __future__ import annotations

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter
from comfyui_ip_adapter.ip_adapter_core.files import adapter_file, finder
from safetensors.torch import save_file

from tests.support.random_models import fill, sections

CONTEXT = 16
VARIANTS = {
    "base": {"feature_dim": 8, "cross_attention_dim": CONTEXT, "tokens": 4},
    "plus": {
        **{"feature_dim": 12, "cross_attention_dim": CONTEXT, "tokens": 4, "dim": 64},
        **{"depth": 4, "heads": 2, "expansion": 4},
    },
    "full": {"feature_dim": 12, "cross_attention_dim": CONTEXT},
}


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def adapter(variant: str) -> IPAdapter:
    names = [name for name in unet().attn_processors if "attn2" in name]
    widths = tuple(64 if "mid_block" in name else 32 for name in names)
    made = IPAdapter(AdapterSpec(variant, tuple(VARIANTS[variant].items()), widths))
    fill(made, 1)
    return made


def official(variant: str) -> dict:
    return sections(adapter(variant).state_dict())


def of_reference(variant: str, *, shared: bool = True, prefix: str = "") -> dict[str, torch.Tensor]:
    """What accelerate saves of the reference scripts' module."""
    state = {}
    for key, x in unet().state_dict().items():
        state[f"{prefix}unet.{key}"] = x
    processors = [name for name in unet().attn_processors]
    for key, x in adapter(variant).state_dict().items():
        part, _, rest = key.partition(".")
        if part == "image_proj":
            state[f"{prefix}image_proj_model.{rest}"] = x
            continue
        number, kind = rest.split(".")[:2]
        state[f"{prefix}unet.{processors[int(number)]}.{kind}.weight"] = x
        if shared:  # a pickle has both names of one tensor
            state[f"{prefix}adapter_modules.{number}.{kind}.weight"] = x
    return state


def of_diffusers(variant: str) -> dict[str, torch.Tensor]:
    """A UNet of diffusers into which diffusers itself has loaded the adapter."""
    model = unet()
    model._load_ip_adapter_weights([official(variant)])
    return {key: x.contiguous() for key, x in model.state_dict().items()}


LAYOUTS = {
    "accelerate's pickle": lambda variant: of_reference(variant),
    "accelerate's safetensors": lambda variant: of_reference(variant, shared=False),
    "wrapped by DDP": lambda variant: of_reference(variant, prefix="module."),
    "a UNet of diffusers": of_diffusers,
}


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapter_inside_is_loaded_to_the_bit(tmp_path, layout, variant, ending):
    path = tmp_path / f"checkpoint{ending}"
    weights = LAYOUTS[layout](variant)
    if ending == ".bin":
        torch.save(weights, path)
    else:
        save_file({key: x.clone() for key, x in weights.items()}, path)
    found = adapter_file.load(path).state_dict()
    expected = adapter(variant).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    (listed,) = finder.adapters([finder.File(path.name, str(path))])
    assert isinstance(listed, finder.AdapterFile), listed
    assert listed.spec == adapter(variant).spec


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda key: "_ip." in key and "adapter_modules" not in key, r"no projection.*model\.safe"),
        (lambda key: "image_proj_model" in key, r"no W'k and W'v.*adapter_modules"),
    ],
    ids=["the UNet alone", "the projection alone"],
)
def test_what_is_missing_is_named_with_where_it_is(tmp_path, kept, message):
    path = tmp_path / "part.safetensors"
    save_file({k: x.clone() for k, x in of_reference("base").items() if kept(k)}, path)
    with pytest.raises(adapter_file.CheckpointError, match=message):
        adapter_file.load(path)


def test_two_adapters_in_one_unet_are_refused(tmp_path):
    model = unet()
    model._load_ip_adapter_weights([official("base"), official("base")])
    path = tmp_path / "two.safetensors"
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, path)
    with pytest.raises(adapter_file.CheckpointError, match="2 adapters inside one UNet"):
        adapter_file.load(path)


def test_faceids_lora_comes_along(tmp_path):
    """The reference's script for FaceID keeps it in `adapter_modules`, of self-attention too."""
    from tests.support import faces

    own = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
    known = faces.tensors("faceid", (32, 64), CONTEXT)
    theirs = {"unet.conv_in.weight": torch.randn(4, 4, 3, 3)}
    for key, x in known.items():
        prefix = next(prefix for prefix in own if key.startswith(prefix))
        theirs[own[prefix] + key.removeprefix(prefix)] = x
    torch.save(theirs, tmp_path / "a.bin")
    made = adapter_file.load(tmp_path / "a.bin")
    lora = {key for key in known if "_lora." in key}
    assert made.spec.variant == "faceid" and lora and made.lora.keys() == lora
    assert all(torch.equal(made.lora[key], known[key]) for key in lora)
