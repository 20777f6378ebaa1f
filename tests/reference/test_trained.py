"""What trains is what samples: a file of train.py's in its own forward pass, ComfyUI, diffusers."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ip_adapter_core.files import adapter_file as checkpoint
from ip_adapter_core.variants import FAMILIES
from tests.reference.test_faces import in_diffusers, prompt
from tests.support import image_folders, small_models
from tests.support.checkpoint_layouts import POOLED
from tests.support.sets import nightly

TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("arrow")


@pytest.fixture(scope="module")
def bases(both, tmp_path_factory):
    """For each family a UNet with all of its layers, and a diffusers folder around it."""
    found = {}
    for name, family in ((name, both.SMALL[name]) for name in FAMILIES):
        context = small_models.HIDDEN * (1 + family.sdxl)
        family = dataclasses.replace(family, context=context)
        folder = tmp_path_factory.mktemp(name)
        small_models.base(folder, name)
        both.diffusers_unet(family).save_pretrained(folder / "unet")
        if family.sdxl:
            second = small_models.second_text_encoder(POOLED)
            second.save_pretrained(folder / "text_encoder_2")
        found[name] = family, folder
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        image_folders.image(number, (80, 70)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    faces = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"file_name": f"{n}.png", "text": "a", "face": x} for n, x in enumerate(faces)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small_models.image_encoder(folder / "encoder")
    return folder


@pytest.fixture
def trained(bases, pictures, tmp_path, accelerate_anew):
    """The file that a short run leaves."""
    from training.config import TrainConfig
    from training.trainer import Trainer

    def trained(family: str, variant: str) -> Path:
        reads = {"image_encoder_path": str(pictures / "encoder")}
        if variant == "faceid":
            reads = {"face_embedding_column": "face"}
        settings = TrainConfig(
            pretrained_model_name_or_path=str(bases[family][1]),
            train_data_dir=str(pictures),
            output_dir=str(tmp_path / "run"),
            variant=variant,
            resolution=64,
            max_train_steps=3,
            train_batch_size=2,
            dataloader_num_workers=0,
            report_to="none",
            learning_rate=1e-2,
            **reads,
        )
        with torch.enable_grad():
            Trainer(settings).train()
        return tmp_path / "run" / "ip-adapter.safetensors"

    return trained


@pytest.mark.parametrize(
    "family, variant",
    [
        *(("sd15", "base"), ("sdxl", "plus")),
        *nightly(("sd15", "plus"), ("sd15", "full"), ("sdxl", "base"), ("sdxl", "full")),
    ],
)
def test_the_three_agree(bases, both, trained, family, variant):
    from training.unet import attach

    path = trained(family, variant)
    encoder = both.Encoder(small_models.EMBED, small_models.STATES, patches=17)
    pair = both.Pair(bases[family][0], encoder)
    pair._weights[variant] = {k: v.float() for k, v in load_file(path).items()}
    prompt = encoder.prompt(1, seed=0)
    adapter, weight = checkpoint.load(path).float(), 0.8
    unet, _ = pair.unet(())
    for call in pair.comfy([both.Setting(variant, prompt, weight)], "model", (16, 24)):
        plain = pair.diffusers(call)
        scales = [[weight] * len(pair.family.widths)]
        theirs = pair.diffusers(call, [variant], [prompt], scales)
        attach(unet)
        features = both.features(variant, prompt, call)[:, 0]
        keys_values = [(key, weight * value) for key, value in adapter(features)]
        ours = unet(
            *(call.x, call.timesteps, call.context),
            added_cond_kwargs=pair.text_and_sizes(call),
            cross_attention_kwargs={"ip_hidden_states": keys_values},
        ).sample
        assert both.error(ours, call.out) < TOLERANCE
        assert both.error(ours, theirs) < TOLERANCE
        assert both.error(ours, plain) > 100 * TOLERANCE
        del pair._unets[()]
        unet, _ = pair.unet(())


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl")])
def test_the_three_agree_on_faces(bases, both, trained, host, family):
    """The node's LoRA is a patch of weights, diffusers' is merged, training's comes with a call."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_adapter

    from training.unet import attach, attention_inputs, new_adapter

    path = trained(family, "faceid")
    state = {k: v.float() for k, v in load_file(path).items()}
    pair = both.Pair(bases[family][0], both.SMALL_ENCODER)
    unet, given, weight = both.diffusers_unet(pair.family), prompt(both, 1), 0.8
    mine = new_adapter(unet, "faceid", 512)
    mine.load_state_dict(state)
    model, texts = both.comfy_model(pair.family), [both.text(pair.family, n) for n in (1, 2)]
    model = both.small.apply(model, load_adapter(str(path)), given, weight=weight, lora_weight=1.0)
    attached = copy.deepcopy(unet)
    attach(attached)
    for call in both.record(model, *texts, (16, 24)):
        plain = pair.diffusers(call)
        given_to = state, "faceid", call, given, weight, 1.0, None
        theirs = in_diffusers(both, copy.deepcopy(unet), pair, *given_to)
        sides = torch.stack([given.positive.face_embeds, given.negative.face_embeds])[:, 0]
        keys_values = [(key, weight * value) for key, value in mine(sides[call.rows])]
        ours = attached(
            *(call.x, call.timesteps, call.context),
            added_cond_kwargs=pair.text_and_sizes(call),
            cross_attention_kwargs=attention_inputs(keys_values, mine),
        ).sample
        assert both.error(ours, call.out) < TOLERANCE
        assert both.error(ours, theirs) < TOLERANCE
        assert both.error(ours, plain) > 100 * TOLERANCE
