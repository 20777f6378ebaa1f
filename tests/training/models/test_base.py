"""Base models come whole out of folders and single files, or are refused with a reason."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ip_adapter_core.variants import FAMILIES
from tests.support import checkpoint_layouts, small_models
from tests.support.random_models import under
from training.errors import TrainingError
from training.models import clip_tokenizer as clip_vocabulary
from training.models import layout
from training.models.base import load_base, load_encoders


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A single file of each family."""
    folder = tmp_path_factory.mktemp("files")
    found = {family: folder / f"{family}.safetensors" for family in FAMILIES}
    for family, path in found.items():
        save_file(small_models.single_file(family), path)
    return found


@pytest.fixture
def copied(frozen, tmp_path):
    """Copy the folder of a family, so that a test can change it."""
    return lambda family: shutil.copytree(frozen / family, tmp_path / "copy")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def with_config(folder, part, **changes):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_all_parts_are_there_frozen_and_in_the_dtype(family, kind, frozen, files, offline):
    path = str(frozen / family if kind == "folder" else files[family])
    base = load_base(path, torch.bfloat16)
    assert base.family == family
    assert len(base.text) == (1 if family == "sd15" else 2)
    for part in [base.unet, base.vae, *(encoder for _, encoder in base.text)]:
        assert not part.training
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in part.parameters())
    assert base.scheduler["beta_schedule"] == "scaled_linear"


class TestFolder:
    def test_the_weights_are_those_that_are_in_it(self, frozen):
        base = load_base(str(frozen / "sdxl"))
        stored = load_file(frozen / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(stored[k], v) for k, v in base.unet.state_dict().items())

    def test_without_the_unet_the_rest_is_the_same(self, frozen, copied):
        folder = copied("sd15")
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        rest = load_encoders(str(folder))
        assert rest.weights == load_base(str(frozen / "sd15")).weights
        assert not hasattr(rest, "unet")

    def test_with_half_precision_files_only(self, frozen, copied):
        folder = copied("sd15")
        for part in ("unet", "vae", "text_encoder"):
            (path,) = (folder / part).glob("*.safetensors")
            path.rename(path.with_suffix(".fp16.safetensors"))
        assert load_base(str(folder)).weights == load_base(str(frozen / "sd15")).weights


class TestWeights:
    @pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.nightly)])
    def test_they_hash_alike_whatever_dtype_and_container(self, family, files, tmp_path):
        state = load_file(files[family])
        torch.save({"state_dict": state}, tmp_path / "model.ckpt")
        save_file({k: v.float() for k, v in state.items()}, tmp_path / "wide.safetensors")
        expected = load_base(str(files[family])).weights
        for path, dtype in (
            (files[family], torch.float16),
            (tmp_path / "model.ckpt", torch.float32),
            (tmp_path / "wide.safetensors", torch.bfloat16),
        ):
            assert load_base(str(path), dtype).weights == expected

    def test_one_other_weight_or_setting_hashes_otherwise(self, files, frozen, tmp_path, copied):
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
        folder = copied("sd15")
        with_config(folder, "text_encoder", hidden_act="gelu")
        before = load_encoders(str(frozen / "sd15")).weights
        assert load_encoders(str(folder)).weights["text encoder"] != before["text encoder"]


class TestFile:
    def test_tensors_arrive(self, files):
        state = load_file(files["sd15"])
        base = load_base(str(files["sd15"]))
        for tensor, name in (
            (base.unet.conv_in.weight, "model.diffusion_model.input_blocks.0.0"),
            (base.vae.encoder.conv_in.weight, "first_stage_model.encoder.conv_in"),
        ):
            assert torch.equal(tensor, state[f"{name}.weight"].float())

    def test_the_second_text_encoder_is_open_clips(self, files):
        """Heads, activation and projection are not in the file; open_clip's own model knows."""
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

    @pytest.mark.parametrize(
        ("family", "size", "expected"),
        [
            (  # unet/config.json of runwayml/stable-diffusion-v1-5
                "sd15",
                checkpoint_layouts.SD15,
                {
                    "block_out_channels": (320, 640, 1280, 1280),
                    "layers_per_block": 2,
                    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
                    "transformer_layers_per_block": [1, 1, 1, 1],
                    "cross_attention_dim": 768,
                    "attention_head_dim": 8,
                    "sample_size": 64,
                    "use_linear_projection": False,
                },
            ),
            (  # of stabilityai/stable-diffusion-xl-base-1.0
                "sdxl",
                checkpoint_layouts.SDXL,
                {
                    "block_out_channels": (320, 640, 1280),
                    "layers_per_block": 2,
                    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
                    "transformer_layers_per_block": [1, 2, 10],
                    "cross_attention_dim": 2048,
                    "attention_head_dim": [5, 10, 20],
                    "sample_size": 128,
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
        ],
        ids=FAMILIES,
    )
    def test_sizes_of_the_published_unets(self, family, size, expected):
        found = layout.unet(under(layout.UNET, checkpoint_layouts.unet(size)), family)
        assert found | expected == found

    def test_one_that_says_it_predicts_v(self, files, tmp_path):
        marked = load_file(files["sdxl"]) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
        save_file(marked, tmp_path / "v.safetensors")
        scheduler = load_base(str(tmp_path / "v.safetensors")).scheduler
        assert scheduler["prediction_type"] == "v_prediction"
        assert scheduler["rescale_betas_zero_snr"]
        assert load_base(str(files["sdxl"])).scheduler["prediction_type"] == "epsilon"


class TestVAE:
    def test_latents_are_scaled_as_the_family_is(self, files):
        for family, factor in (("sd15", 0.18215), ("sdxl", 0.13025)):
            assert load_encoders(str(files[family])).vae.config.scaling_factor == factor

    def test_sdxls_stays_in_float32_where_float16_is_asked_for(self, frozen, files):
        for path in (frozen / "sdxl", files["sdxl"]):
            assert load_encoders(str(path), torch.float16).vae.dtype == torch.float32
        assert load_encoders(str(frozen / "sd15"), torch.float16).vae.dtype == torch.float16

    def test_a_corrected_one_goes_to_float16(self, frozen, copied):
        folder = copied("sdxl")
        with_config(folder, "vae", force_upcast=False)
        assert load_encoders(str(folder), torch.float16).vae.dtype == torch.float16
        replaced = load_encoders(str(frozen / "sdxl"), torch.float16, vae=str(folder / "vae"))
        assert replaced.vae.dtype == torch.float16

    def test_another_stands_in_from_a_folder_or_a_file(self, frozen, files, tmp_path):
        state = load_file(files["sd15"])
        prefix = layout.VAE
        alone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        save_file(alone, tmp_path / "vae.safetensors")
        own = load_encoders(str(files["sd15"])).weights
        before = load_encoders(str(frozen / "sd15")).weights
        for given in (files["sd15"], tmp_path / "vae.safetensors"):
            after = load_encoders(str(frozen / "sd15"), vae=str(given)).weights
            assert after["vae"] == own["vae"] != before["vae"]
            assert after["text encoder"] == before["text encoder"]
        for given in (frozen / "sdxl", frozen / "sdxl" / "vae"):
            again = load_encoders(str(files["sd15"]), vae=str(given)).weights
            assert again["vae"] == before["vae"]


class TestTokenizer:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "a photo of a cat",
            "A  CAT's   café, naïve — 12345; don't, we've",
            "日本語 テキスト 🙂 ok",
            "word " * 100,
            "  lines\n\tand tabs ",
        ],
    )
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

    def test_a_folder_without_one_gets_clips(self, files, offline, copied):
        folder = copied("sd15")
        shutil.rmtree(folder / "tokenizer")
        with pytest.raises(TrainingError, match="49408 tokens, its text encoder only 190"):
            load_encoders(str(folder))
        (_, encoder), *_ = load_encoders(str(files["sd15"])).text
        encoder.save_pretrained(folder / "text_encoder")
        ((tokenizer, _),) = load_encoders(str(folder)).text
        assert tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]


def refused(path, said):
    with pytest.raises(TrainingError, match=said):
        load_base(str(path))


class TestRefused:
    def test_what_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
        for name in ("missing.safetensors", "missing/model.ckpt"):
            refused(tmp_path / name, "does not exist")
        refused("nobody/no-such-model", "neither a file nor a folder here")
        (tmp_path / "notes.txt").write_text("")
        refused(tmp_path, r"unet/, vae/.*found notes\.txt")

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
    def test_a_folder_without_a_part(self, part, copied):
        folder = copied("sd15")
        shutil.rmtree(folder / part)
        refused(folder, part)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_a_folder_that_lacks_a_tensor(self, part, copied):
        folder = copied("sd15")
        (path,) = (folder / part).glob("*.safetensors")
        state = load_file(path)
        del state[next(key for key in state if key.endswith("norm1.weight"))]
        save_file(state, path, {"format": "pt"})
        refused(folder, f"{part} is incomplete")

    def test_a_folder_of_another_family(self, copied):
        folder = copied("sd15")
        for changes, said in (
            ({"cross_attention_dim": 1024}, "Stable Diffusion 2"),
            ({"addition_embed_type": "image"}, "another kind"),
            ({"in_channels": 9}, "9 channels"),
        ):
            with_config(folder, "unet", **changes)
            refused(folder, said)

    @pytest.mark.parametrize(
        ("key", "said"),
        [
            ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
            ("conditioner.embedders.0.model.ln_final.weight", "refiner"),
            ("model.diffusion_model.joint_blocks.0.weight", "Stable Diffusion 3"),
            ("model.diffusion_model.double_blocks.0.weight", "Flux"),
            ("model.diffusion_model.input_blocks.0.0.weight", "9 channels"),
            ("down_blocks.0.weight", "diffusers' layout"),
            ("control_model.input_blocks.0.0.weight", "ControlNet"),
            ("image_proj.proj.weight", "IP-Adapter"),
            ("lora_unet_x.weight", "LoRA"),
            ("something.weight", "has no UNet"),
        ],
    )
    def test_a_file_of_another_kind(self, key, said, tmp_path):
        save_file({key: torch.zeros(32, 9, 3, 3)}, tmp_path / "other.safetensors")
        refused(tmp_path / "other.safetensors", said)

    @pytest.mark.parametrize(
        ("family", "lost", "said"),
        [
            ("sd15", "first_stage_model.", "no complete VAE"),
            ("sd15", "cond_stage_model.", "no complete text encoder"),
            ("sdxl", "conditioner.embedders.1.", "no complete second text encoder"),
            ("sd15", "model.diffusion_model.out.0.weight", "lacks tensors of the"),
            ("sd15", "first_stage_model.decoder.norm_out.bias", "lacks tensors of the"),
            (
                "sd15",
                "cond_stage_model.transformer.text_model.final_layer_norm.bias",
                "lacks tensors of the",
            ),
        ],
    )
    def test_a_file_that_lacks_something(self, family, lost, said, files, tmp_path):
        state = load_file(files[family])
        path = tmp_path / "part.safetensors"
        save_file({k: v for k, v in state.items() if not k.startswith(lost)}, path)
        refused(path, said)

    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    def test_a_file_cut_short(self, suffix, files, tmp_path):
        path = tmp_path / f"cut{suffix}"
        state = load_file(files["sd15"])
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
        refused(path, "cannot be read as a model")
