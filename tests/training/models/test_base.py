"""Base models come whole out of folders and single files, or are refused with a reason."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ip_adapter_core.variants import FAMILIES
from tests.support import small_models
from training.errors import TrainingError
from training.models import clip_tokenizer as clip_vocabulary
from training.models import layout
from training.models.base import load_base, load_encoders


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def parts(base):
    return [base.unet, base.vae, *(encoder for _, encoder in base.text)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_all_parts_are_there_frozen_and_in_the_dtype(family, kind, folders, files, offline):
    path = str((folders if kind == "folder" else files)[family])
    base = load_base(path, torch.bfloat16)
    assert base.family == family
    assert len(base.text) == (1 if family == "sd15" else 2)
    for part in parts(base):
        assert not part.training
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in part.parameters())
    assert base.scheduler["beta_schedule"] == "scaled_linear"


def test_a_folder_gives_the_weights_that_are_in_it(folders):
    base = load_base(str(folders["sdxl"]))
    stored = load_file(folders["sdxl"] / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[k], v) for k, v in base.unet.state_dict().items())


def test_without_the_unet_the_rest_is_the_same(folders, copied):
    folder = copied(folders["sd15"])
    whole = load_base(str(folder))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    rest = load_encoders(str(folder))
    assert rest.weights == whole.weights
    assert not hasattr(rest, "unet")


def test_a_folder_with_half_precision_files_only(folders, copied):
    folder = copied(folders["sd15"])
    for old, new in (
        ("unet/diffusion_pytorch_model", "unet/diffusion_pytorch_model.fp16"),
        ("vae/diffusion_pytorch_model", "vae/diffusion_pytorch_model.fp16"),
        ("text_encoder/model", "text_encoder/model.fp16"),
    ):
        (folder / f"{old}.safetensors").rename(folder / f"{new}.safetensors")
    assert load_base(str(folder)).weights == load_base(str(folders["sd15"])).weights


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.nightly)])
def test_weights_hash_alike_whatever_dtype_and_container(family, files, tmp_path):
    base = load_base(str(files[family]))
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(files[family])}, pickled)
    wide = tmp_path / "wide.safetensors"
    save_file({k: v.float() for k, v in load_file(files[family]).items()}, wide)
    for path, dtype in ((files[family], torch.float16), (pickled, None), (wide, torch.bfloat16)):
        assert load_base(str(path), dtype or torch.float32).weights == base.weights


def test_one_other_weight_or_setting_hashes_otherwise(files, folders, tmp_path, copied):
    state = load_file(files["sd15"])
    before = load_encoders(str(files["sd15"])).weights
    for key, part in (
        ("first_stage_model.quant_conv.bias", "vae"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text encoder"),
    ):
        changed = {**state, key: state[key].clone()}
        changed[key][0] += 0.5
        save_file(changed, tmp_path / "changed.safetensors")
        after = load_encoders(str(tmp_path / "changed.safetensors")).weights
        assert {name for name in after if after[name] != before[name]} == {part}
    folder = copied(folders["sd15"])
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    before = load_encoders(str(folders["sd15"])).weights
    assert load_encoders(str(folder)).weights["text encoder"] != before["text encoder"]


def test_a_single_files_tensors_arrive(files):
    state = load_file(files["sd15"])
    base = load_base(str(files["sd15"]))
    found = base.unet.conv_in.weight, base.vae.encoder.conv_in.weight
    names = "model.diffusion_model.input_blocks.0.0", "first_stage_model.encoder.conv_in"
    for tensor, name in zip(found, names, strict=True):
        assert torch.equal(tensor, state[f"{name}.weight"].float())


def test_a_single_files_second_text_encoder_is_open_clips(files):
    """Heads, activation and projection are not in the file; open_clip's own model knows them."""
    prefix = layout.TEXT_G
    state = {k.removeprefix(prefix): v.float() for k, v in load_file(files["sdxl"]).items()}
    width = small_models.TEXT_G
    reference = small_models.open_clip_model(text_width=width, embed=width)
    reference.load_state_dict(state, strict=False)
    tokenizer, encoder = load_base(str(files["sdxl"])).text[1]
    texts = ["a cat", "two small birds on a wire"]
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected = reference.encode_text(open_clip.tokenize(texts))
    assert torch.allclose(encoder(ids).text_embeds, expected, rtol=1e-5, atol=1e-5)


def unet_shapes(widths, depths, middle, context, linear, vector=None):
    """What of the published UNets tells their sizes."""
    unet, shapes, number = layout.UNET, {}, 1
    shapes[f"{unet}input_blocks.0.0.weight"] = (widths[0], 4, 3, 3)
    shapes[f"{unet}out.2.weight"] = (4, widths[0], 3, 3)
    window = () if linear else (1, 1)

    def transformers(name, width, depth):
        for i in range(depth):
            block = f"{unet}{name}.transformer_blocks.{i}"
            shapes[f"{block}.attn2.to_k.weight"] = (width, context)
            shapes[f"{unet}{name}.proj_in.weight"] = (width, width, *window)

    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for _ in range(2):
            shapes[f"{unet}input_blocks.{number}.0.out_layers.3.weight"] = (width, width, 3, 3)
            transformers(f"input_blocks.{number}.1", width, depth)
            number += 1
        if level < len(widths) - 1:
            shapes[f"{unet}input_blocks.{number}.0.op.weight"] = (width, width, 3, 3)
            number += 1
    transformers("middle_block.1", widths[-1], middle)
    if vector:
        shapes[f"{unet}label_emb.0.0.weight"] = (4 * widths[0], vector)
    return shapes


def test_sizes_of_the_published_unets():
    """unet/config.json of runwayml/stable-diffusion-v1-5 and of
    stabilityai/stable-diffusion-xl-base-1.0."""
    shapes = unet_shapes((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 768, linear=False)
    found = layout.unet(shapes, "sd15")
    assert found["block_out_channels"] == (320, 640, 1280, 1280)
    assert found["layers_per_block"] == 2
    assert found["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert found["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert found["transformer_layers_per_block"] == [1, 1, 1, 1]
    assert (found["cross_attention_dim"], found["attention_head_dim"]) == (768, 8)
    assert (found["sample_size"], found["use_linear_projection"]) == (64, False)

    shapes = unet_shapes((320, 640, 1280), (0, 2, 10), 10, 2048, linear=True, vector=2816)
    found = layout.unet(shapes, "sdxl")
    assert found["block_out_channels"] == (320, 640, 1280)
    assert found["down_block_types"] == ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2
    assert found["up_block_types"] == ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]
    assert found["transformer_layers_per_block"] == [1, 2, 10]
    assert (found["cross_attention_dim"], found["attention_head_dim"]) == (2048, [5, 10, 20])
    assert found["addition_embed_type"] == "text_time"
    assert found["projection_class_embeddings_input_dim"] == 2816
    assert (found["sample_size"], found["use_linear_projection"]) == (128, True)


def test_transformers_on_the_way_up_alone_and_no_middle():
    """The miniature's layout, which diffusers builds and ComfyUI reads."""
    unet = "model.diffusion_model."
    block = "1.transformer_blocks.0.attn2.to_k.weight"
    shapes = {
        f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{unet}input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
        **{f"{unet}output_blocks.{i}.{block}": (320, 768) for i in range(2)},
        f"{unet}output_blocks.0.1.proj_in.weight": (320, 320, 1, 1),
        f"{unet}out.2.weight": (4, 320, 3, 3),
    }
    found = layout.unet(shapes, "sd15")
    assert found["down_block_types"] == ["DownBlock2D"]
    assert found["up_block_types"] == ["CrossAttnUpBlock2D"]
    assert found["mid_block_type"] is None
    assert found["transformer_layers_per_block"] == [1]


def test_latents_are_scaled_as_the_family_is(files):
    for family, factor in (("sd15", 0.18215), ("sdxl", 0.13025)):
        assert load_encoders(str(files[family])).vae.config.scaling_factor == factor


def test_a_file_that_says_it_predicts_v(files, tmp_path):
    marked = load_file(files["sdxl"]) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(marked, tmp_path / "v.safetensors")
    scheduler = load_base(str(tmp_path / "v.safetensors")).scheduler
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"]
    assert load_base(str(files["sdxl"])).scheduler["prediction_type"] == "epsilon"


class TestVAE:
    def test_sdxls_stays_in_float32_where_float16_is_asked_for(self, folders, files, tmp_path):
        for path in (folders["sdxl"], files["sdxl"]):
            assert load_encoders(str(path), torch.float16).vae.dtype == torch.float32
            assert load_encoders(str(path), torch.bfloat16).vae.dtype == torch.bfloat16
        assert load_encoders(str(folders["sd15"]), torch.float16).vae.dtype == torch.float16

    def test_a_corrected_one_goes_to_float16(self, folders, copied):
        folder = copied(folders["sdxl"])
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
        assert load_encoders(str(folder), torch.float16).vae.dtype == torch.float16
        replaced = load_encoders(str(folders["sdxl"]), torch.float16, vae=str(folder / "vae"))
        assert replaced.vae.dtype == torch.float16

    def test_another_stands_in_from_a_folder_or_a_file(self, folders, files, tmp_path):
        state = load_file(files["sd15"])
        prefix = layout.VAE
        alone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        save_file(alone, tmp_path / "vae.safetensors")
        own = load_encoders(str(files["sd15"]))
        base = str(folders["sd15"])
        before = load_encoders(base)
        for given in (files["sd15"], tmp_path / "vae.safetensors"):
            after = load_encoders(base, vae=str(given))
            assert after.weights["vae"] == own.weights["vae"] != before.weights["vae"]
            assert after.weights["text encoder"] == before.weights["text encoder"]
        for given in (folders["sdxl"], folders["sdxl"] / "vae"):
            again = load_encoders(str(files["sd15"]), vae=str(given))
            assert again.weights["vae"] == before.weights["vae"]


class TestTokenizer:
    TEXTS = (
        "",
        "a photo of a cat",
        "A  CAT's   café, naïve — 12345; don't, we've",
        "日本語 テキスト 🙂 ok",
        "word " * 100,
        "  lines\n\tand tabs ",
    )

    @pytest.mark.parametrize("text", TEXTS)
    def test_the_shipped_vocabulary_is_open_clips(self, text, offline):
        expected = open_clip.tokenize([text])[0]
        for pad in (clip_vocabulary.END, "!"):
            tokenizer = clip_vocabulary.tokenizer(pad)
            found = tokenizer(text, padding="max_length", truncation=True, max_length=77)
            ids = torch.tensor(found.input_ids)
            end = int(expected.argmax())  # the end of the text is the largest number
            assert torch.equal(ids[: end + 1], expected[: end + 1])
            assert ids[end + 1 :].eq(tokenizer.pad_token_id).all()

    def test_sdxls_second_one_fills_up_with_zeros(self, files):
        first, second = (tokenizer for tokenizer, _ in load_encoders(str(files["sdxl"])).text)
        assert (first.pad_token_id, second.pad_token_id) == (49407, 0)

    def test_a_folder_without_one_gets_clips(self, folders, files, offline, copied):
        folder = copied(folders["sd15"])
        shutil.rmtree(folder / "tokenizer")
        (_, encoder), *_ = load_encoders(str(files["sd15"])).text
        encoder.save_pretrained(folder / "text_encoder")
        ((tokenizer, _),) = load_encoders(str(folder)).text
        assert tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]

    def test_one_of_another_model_is_refused(self, folders, copied):
        folder = copied(folders["sd15"])
        shutil.rmtree(folder / "tokenizer")
        with pytest.raises(TrainingError, match="49408 tokens, its text encoder only 190"):
            load_encoders(str(folder))
