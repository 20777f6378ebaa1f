"""FaceID adapters predict the same noise here as in diffusers, their LoRA merged by hand there."""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file

from tests.reference.test_same_function import SIZE, TOLERANCE, smooth_mask
from tests.support import faces
from tests.support.random_models import sections
from tests.support.sets import nightly

KINDS = ["faceid", "faceid-plus-v1", "faceid-plus-v2", "portrait", "faceid-unnorm"]
FILES = {"faceid-plus-v1": "ip-adapter-faceid-plus_sd15.safetensors"}
HIDDEN, PATCHES = 56, 33


@pytest.fixture(scope="module")
def loaded(both):
    """An adapter of a kind for a UNet of few channels, through a file; and its tensors."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_adapter

    known = {}

    def loaded(family, kind):
        if (family, kind) not in known:
            size = both.SMALL[family]
            state = faces.tensors(kind, size.widths, size.context, hidden=HIDDEN)
            with TemporaryDirectory() as folder:
                path = f"{folder}/{FILES.get(kind, 'renamed.safetensors')}"
                save_file({k: x.contiguous() for k, x in state.items()}, path)
                adapter = load_adapter(path)
            if kind == "faceid-plus-v1":  # told from v2 by its name on 768-wide text alone
                adapter.module.image_proj.shortcut = False
            known[family, kind] = adapter, state
        return known[family, kind]

    return loaded


def prompt(both, count, structure=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    face = 20 * torch.randn(count, 512, generator=generator)
    states = torch.randn(count + 1, PATCHES, HIDDEN, generator=generator)
    features = both.ImageFeatures(torch.zeros(count, 0), states[:count], face)
    zero = both.ImageFeatures(torch.zeros(1, 0), states[count:], torch.zeros(1, 512))
    return both.ImagePrompt(features, zero, "a random face encoder", "", structure)


def in_diffusers(both, unet, pair, state, kind, call, given, weight, lora, mask):
    parts = sections({k: x.float() for k, x in state.items() if "_lora." not in k})
    unet._load_ip_adapter_weights([parts])
    faces.merge_lora(unet, state, lora)
    layers = [p for p in unet.attn_processors.values() if hasattr(p, "scale")]
    for processor in layers:
        processor.scale = [weight]
    sides = given.positive, given.negative
    count = len(sides[0])
    face = [side.face_embeds.expand(count, -1) for side in sides]
    if kind != "faceid-unnorm":
        face = [torch.nn.functional.normalize(x, dim=-1) for x in face]
    embeds = torch.stack(face)[call.rows]
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    if kind.startswith("faceid-plus"):
        states = [side.penultimate_hidden_states.expand(count, -1, -1) for side in sides]
        projection.clip_embeds = torch.stack(states)[call.rows]
        projection.shortcut = kind.endswith("v2")
        projection.shortcut_scale = given.structure
    if kind == "faceid-unnorm":
        embeds = embeds[:, :, None]
    added = {**pair.text_and_sizes(call), "image_embeds": [embeds]}
    extra = None if mask is None else {"ip_adapter_masks": [mask[None]]}
    hook = unet.encoder_hid_proj.register_forward_hook(both.in_a_row) if mask is not None else None
    out = unet(
        call.x, call.timesteps, call.context, added_cond_kwargs=added, cross_attention_kwargs=extra
    )
    if hook:
        hook.remove()
    return out.sample


CASES = [  # λ, LoRA weight, faces, mask
    (1.0, 0.6, 1, None),
    (0.3, 1.0, 3, None),
    (1.0, 0.0, 1, (101, 150)),
]


@pytest.mark.parametrize("weight, lora, count, mask", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl")])
def test_the_same_noise(both, pairs, loaded, host, family, kind, weight, lora, count, mask):
    pair = pairs[family]
    adapter, state = loaded(family, kind)
    given = prompt(both, count, structure=1.4 if kind.startswith("faceid-plus") else 1.0)
    mask = smooth_mask(mask, 1)
    import comfy.model_management

    comfy.model_management.unload_all_models()  # which takes LoRAs out of the shared weights
    model, texts = both.comfy_model(pair.family), [both.text(pair.family, n) for n in (1, 2)]
    unet = copy.deepcopy(both.diffusers_unet(pair.family))
    model = both.small.apply(model, adapter, given, weight=weight, mask=mask, lora_weight=lora)
    for call in both.record(model, *texts, SIZE):
        given_to = state, kind, call, given, weight, lora, mask
        expected = in_diffusers(both, copy.deepcopy(unet), pair, *given_to)
        assert both.error(call.out, expected) < TOLERANCE


def test_the_lora_is_applied_once_and_by_nothing_else(both, pairs, loaded):
    """Also where the weight is 0, then the model's weights stay as they are to the bit."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.face_lora import _named, with_lora

    pair = pairs["sd15"]
    adapter, _ = loaded("sd15", "faceid")
    model = both.comfy_model(pair.family)
    once = with_lora(model, adapter, 0.6)
    layers = 2 * len(pair.family.widths)
    assert len(once.patches) == 4 * layers and not model.patches
    assert with_lora(once, adapter, 0.6) is once and with_lora(model, adapter, 0.0) is model
    named = _named(model, adapter.module.lora)
    import comfy.sd

    separate, _ = comfy.sd.load_lora_for_models(model, None, named, 0.6, 0)
    assert with_lora(separate, adapter, 1.0) is separate
    given = prompt(both, 1)
    nothing = both.small.apply(model, adapter, given, weight=0.0)
    assert nothing is model
    twice = both.small.apply(both.small.apply(model, adapter, given), adapter, given)
    assert all(len(patches) == 1 for patches in twice.patches.values())


@pytest.mark.parametrize("kind", ["faceid", "faceid-plus-v2", "portrait"])
def test_half_a_file_is_refused(loaded, tmp_path, kind):
    from comfyui_ip_adapter.ip_adapter_core.files.adapter_file import CheckpointError, load

    _, state = loaded("sd15", kind)
    lacking = [k for k in state if "_lora." in k][:20] or [k for k in state if "ip_adapter" in k][
        :2
    ]
    for name in lacking[-2:]:
        path = tmp_path / "half.safetensors"
        save_file({k: x for k, x in state.items() if k != name}, path)
        with pytest.raises(CheckpointError, match=r"'half\.safetensors'.*missing.*Download it"):
            load(path)
