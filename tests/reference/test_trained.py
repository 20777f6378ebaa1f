"""What trains is what samples: a file of train.py's in its own forward pass, ComfyUI, diffusers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ip_adapter_core.files import adapter_file as checkpoint
from tests.support import image_folders, small_models
from tests.support.checkpoint_layouts import POOLED
from tests.support.sets import nightly

TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("arrow")


@pytest.fixture(scope="module")
def bases(both, tmp_path_factory):
    """For each family a UNet with all of its layers, and a diffusers folder around it."""
    found = {}
    for name, family in both.SMALL.items():
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
    small_models.image_encoder(folder / "encoder")
    return folder


@pytest.fixture
def trained(bases, pictures, tmp_path, accelerate_anew):
    """The file that a short run leaves."""
    from training.config import TrainConfig
    from training.trainer import Trainer

    def trained(family: str, variant: str) -> Path:
        settings = TrainConfig(
            pretrained_model_name_or_path=str(bases[family][1]),
            image_encoder_path=str(pictures / "encoder"),
            train_data_dir=str(pictures),
            output_dir=str(tmp_path / "run"),
            variant=variant,
            resolution=64,
            max_train_steps=3,
            train_batch_size=2,
            dataloader_num_workers=0,
            report_to="none",
            learning_rate=1e-2,
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
