"""Encode Face: which face, of which pictures, and what becomes of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.support import faces

pytest.importorskip("onnx", reason="`pip install onnx onnxruntime`")
pytest.importorskip("onnxruntime", reason="`pip install onnxruntime`")


@pytest.fixture
def packs(folder):
    """The folder of model packs, with one that is whole and one that is not."""
    place = folder.parent / "insightface" / "models"
    faces.write_pack(place / "buffalo_l")
    (place / "half").mkdir(parents=True)
    (place / "half" / "det_10g.onnx").touch()
    return place


@pytest.fixture
def encoder(nodes, packs):
    return nodes["IPA_LoadFaceEncoder"].execute("buffalo_l").args[0]


@pytest.fixture
def encode(nodes, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))

    def encode(**given):
        settings = {"order": "largest", "number": 1, "several": "side by side", "structure": 1.0}
        return nodes["IPA_EncodeFace"].execute(**{**settings, **given})

    return encode


@pytest.fixture
def adapter(small, folder):
    """A random FaceID adapter for a model of `small`, through a file."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_adapter

    def adapter(kind="faceid"):
        widths = [width for _, width in small.SD15_LAYERS]
        state = faces.tensors(kind, widths, small.CONTEXT, hidden=small.HIDDEN)
        path = folder / f"{kind}.safetensors"
        save_file(state, path)
        return load_adapter(path)

    return adapter


def pictures(count=1, height=300, width=400, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, channels, 20, 30, generator=generator)
    return torch.nn.functional.interpolate(small, (height, width)).movedim(1, -1)


def test_the_packs_that_are_whole_are_listed(nodes, packs):
    schema = nodes["IPA_LoadFaceEncoder"].INPUT_TYPES()
    assert schema["required"]["encoder_name"][1]["options"] == ["buffalo_l"]
    with pytest.raises(FileNotFoundError, match=r"'antelopev2' is not there.*insightface"):
        nodes["IPA_LoadFaceEncoder"].execute("antelopev2")


def test_nothing_is_fetched(nodes, packs, encode, adapter, small, clip_vision, monkeypatch):
    tried = []

    def refuse(*given, **_):
        tried.append(given)
        raise OSError("no network in this test")

    for name in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(name, refuse)
    (encoder,) = nodes["IPA_LoadFaceEncoder"].execute("buffalo_l").args
    given = {"face_encoder": encoder, "image": pictures(), "clip_vision": clip_vision}
    small.sample(small.apply(small.model(), adapter("faceid-plus-v2"), encode(**given).args[0]))
    with pytest.raises(FileNotFoundError, match="insightface"):
        nodes["IPA_LoadFaceEncoder"].execute("antelopev2")
    assert not tried


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_surest_and_the_largest(encode, encoder, channels):
    image = pictures(2, channels=channels)
    found = encode(face_encoder=encoder, image=image)
    prompt, crops, shown = found.args
    assert prompt.positive.face_embeds.shape == (2, 512) and len(prompt.negative) == 1
    assert not prompt.negative.face_embeds.any()
    assert crops.shape == (2, 224, 224, 3) and shown.shape == (2, 256, 256, 3)
    assert len(found.ui.as_dict()["images"]) == 2
    rgb = image.expand(-1, -1, -1, 3) if channels == 1 else image[..., :3]
    ordered = sorted(encoder.faces(rgb[0]), key=lambda face: -face.area)
    third = encode(face_encoder=encoder, image=image[:1], number=3).args[0]
    from comfyui_ip_adapter.ip_adapter_core.face_encoder import aligned

    for prompt_, face in ((prompt, ordered[0]), (third, ordered[2])):
        wanted = encoder.embed(aligned(rgb[0], face.points)[None])[0]
        torch.testing.assert_close(prompt_.positive.face_embeds[0], wanted)
    left = encode(face_encoder=encoder, image=image[:1], order="left to right").args[0]
    first = min(encoder.faces(rgb[0]), key=lambda face: float(face.box[0]))
    wanted = encoder.embed(aligned(rgb[0], first.points)[None])
    torch.testing.assert_close(left.positive.face_embeds, wanted)


def test_one_person_of_several_pictures(encode, encoder):
    each = encode(face_encoder=encoder, image=pictures(3)).args[0].positive.face_embeds
    made = encode(face_encoder=encoder, image=pictures(3), several="average").args[0]
    directions = each / each.norm(dim=-1, keepdim=True)
    wanted = directions.mean(0) * each.norm(dim=-1).mean()
    torch.testing.assert_close(made.positive.face_embeds[0], wanted)


@pytest.mark.parametrize("shape", [(512,), (2, 512), (2, 1, 512)])
def test_embeddings_from_elsewhere(encode, shape):
    embeds = torch.randn(shape)
    prompt = encode(face_embeds=embeds).args[0]
    assert torch.equal(prompt.positive.face_embeds, embeds.reshape(-1, 512))


@pytest.mark.parametrize("given, said", [
    ({}, "nothing to encode"),
    ({"face_embeds": torch.rand(2, 768)}, r"shape \[2, 768\]; expected \[faces, 512\].*buffalo_l"),
    ({"face_embeds": torch.full((1, 512), float("nan"))}, "NaN or infinite.*Look at the node"),
    ({"face_embeds": torch.zeros(0, 512)}, r"shape \[0, 512\]"),
])  # fmt: skip
def test_what_is_no_face(encode, given, said):
    with pytest.raises(ValueError, match=said):
        encode(**given)


def test_a_number_that_is_not_there(encode, encoder):
    image = pictures()
    count = len(encoder.faces(image[0]))
    said = f"Picture 1 has {count} faces, but face {count + 1} is asked for"
    with pytest.raises(ValueError, match=said):
        encode(face_encoder=encoder, image=image, number=count + 1)


KINDS = ["faceid", "faceid-plus-v2", "portrait", "faceid-unnorm"]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_prompts_can_do(encode, encoder, adapter, small, clip_vision, nodes, kind,
                                        save, load):  # fmt: skip
    """Weights, masks, one face a latent, both routes, combined, saved."""
    loaded = adapter(kind)
    vision = {"clip_vision": clip_vision} if "plus" in kind else {}
    prompt = encode(face_encoder=encoder, image=pictures(2), **vision).args[0]
    texts, plain = (small.text(1), small.text(2)), small.model()
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    settings = {"weight": 0.7, "mask": mask, "combine": "per_latent", "start_at": 0.2}
    behind = small.sample(small.apply(plain, loaded, prompt, **settings))
    model, *carried = small.apply_conditioning(plain, *texts, loaded, prompt, **settings)
    torch.testing.assert_close(small.sample(model, *carried), behind)
    assert (behind - small.sample(plain)).abs().max() > 0.01
    name = save.execute(prompt, "image_prompts/face").ui["image_prompts"][0]["filename"]
    again = load.execute(f"image_prompts/{name} [output]").args[0]
    assert torch.equal(again.positive.face_embeds, prompt.positive.face_embeds)
    assert again.structure == prompt.structure and again.encoder == prompt.encoder
    torch.testing.assert_close(small.sample(small.apply(plain, loaded, again, **settings)), behind)
    one, two = (encode(face_encoder=encoder, image=x[None], **vision).args[0] for x in pictures(2))
    both = nodes["IPA_CombinePrompts"].execute({"prompt0": one, "prompt1": two}, "concat", "")
    joined = small.sample(small.apply(plain, loaded, both.args[0]))
    torch.testing.assert_close(joined, small.sample(small.apply(plain, loaded, prompt)))


def test_what_does_not_go_together(encode, encoder, adapter, small, clip_vision):
    prompt = encode(face_encoder=encoder, image=pictures()).args[0]
    with pytest.raises(
        ValueError, match=r"plus-v2\.safetensors' reads the face's crop.*clip_vision"
    ):
        small.apply(small.model(), adapter("faceid-plus-v2"), prompt)
    with pytest.raises(ValueError, match=r"reads a face embedding.*Take Encode Face"):
        small.apply(small.model(), adapter(), small.images())
    with pytest.raises(ValueError, match="reads the encoder's image embedding"):
        small.apply(small.model(), small.adapter(), prompt)


def test_embeddings_from_elsewhere_as_pictures_are(encode, clip_vision, small):
    embeds = 20 * torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    side, one = (encode(face_embeds=embeds, several=s).args[0] for s in ("side by side", "average"))
    assert len(side.positive) == 3 and len(one.positive) == 1
    torch.testing.assert_close(one.positive.face_embeds, side.positive.mean().face_embeds)
    with pytest.raises(ValueError, match="holds 3 faces, but image holds 1 pictures"):
        encode(face_embeds=embeds, image=pictures(), clip_vision=clip_vision)
    with pytest.raises(ValueError, match="several is 'sum'"):
        encode(face_embeds=embeds, several="sum")


def test_faces_of_two_structures_are_not_one_prompt(encode, nodes):
    embeds = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    prompts = {f"prompt{i}": encode(face_embeds=embeds, structure=s).args[0]
               for i, s in enumerate((0.5, 2.0))}  # fmt: skip
    with pytest.raises(ValueError, match=r"structures 0\.5, 2 cannot be one prompt"):
        nodes["IPA_CombinePrompts"].execute(prompts, "concat", "")


def test_another_face_encoder_is_told(encode, adapter, small, caplog):
    from dataclasses import replace

    embeds = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    prompt = replace(encode(face_embeds=embeds).args[0], encoder="the face encoder 'antelopev2'")
    small.apply(small.model(), adapter("faceid"), prompt)
    assert "mean other faces" in caplog.text
    assert "load buffalo_l in Load Face Encoder" in caplog.text


def test_a_second_weight_of_the_same_lora_is_told(encode, adapter, small, caplog):
    embeds = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    prompt, first, second = encode(face_embeds=embeds).args[0], adapter("faceid"), adapter("faceid")
    model = small.apply(small.model(), first, prompt, lora_weight=0.5)
    assert "acts on this model already" not in caplog.text
    again = small.apply(model, second, prompt, lora_weight=1.0)  # another loader of the same file
    assert "acts on this model already, at 0.5; the lora_weight 1" in caplog.text
    assert {k: len(v) for k, v in again.patches.items()} == {k: 1 for k in model.patches}


@pytest.mark.parametrize("lora", [0.0, 0.6])
def test_what_the_lora_does_to_the_models_weights(encode, adapter, small, lora):
    """At 0 none changes by a bit, within the run or after it; else all are as before after it."""
    import comfy.model_management
    from comfy.patcher_extension import WrappersMP

    embeds = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    model, prompt = small.model(seed=7), encode(face_embeds=embeds).args[0]
    weights = model.model.diffusion_model.state_dict()
    before, within = {key: x.clone() for key, x in weights.items()}, []

    def look(executor, *args, **kwargs):
        now = model.model.diffusion_model.state_dict()
        within.append({key for key, x in before.items() if not torch.equal(x, now[key])})
        return executor(*args, **kwargs)

    applied = small.apply(model, adapter("faceid"), prompt, lora_weight=lora)
    applied.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    small.sample(applied)
    layers = 2 * len(small.SD15_LAYERS)
    assert {len(changed) for changed in within} == {4 * layers if lora else 0}
    if lora:
        comfy.model_management.unload_all_models()
    after = model.model.diffusion_model.state_dict()
    assert all(torch.equal(x, after[key]) for key, x in before.items())


def test_structure_is_how_much_of_the_crop_is_followed(
    encode, encoder, adapter, small, clip_vision
):
    loaded = adapter("faceid-plus-v2")
    given = {"face_encoder": encoder, "image": pictures(), "clip_vision": clip_vision}
    none, other = (
        small.apply(small.model(), loaded, encode(**given, structure=s).args[0]) for s in (0, 1.5)
    )
    assert not torch.equal(small.sample(none), small.sample(other))


@pytest.mark.parametrize("preset, kind", [
    ("faceid", "faceid"), ("faceid-plus", "faceid-plus-v2"), ("portrait", "portrait"),
])  # fmt: skip
def test_the_presets_find_faces(small, folder, encoders, preset, kind):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import loaders
    from comfyui_ip_adapter.nodes import paths

    widths = [width for _, width in small.SD15_LAYERS]
    for each in ("faceid", "faceid-plus-v2", "portrait"):
        state = faces.tensors(each, widths, small.CONTEXT, hidden=small.HIDDEN)
        save_file(state, folder / f"{'x' * len(each)}.safetensors")
    given = small.model(), preset, paths.adapters(), paths.encoders()
    if preset == "faceid-plus":
        with pytest.raises(FileNotFoundError, match="no image encoder for it was found"):
            loaders.find_files(*given)
        return
    choice = loaders.find_files(*given)
    assert choice.adapter.name == f"{'x' * len(kind)}.safetensors" and choice.encoder is None
    assert loaders.describe_choice(choice).endswith("It reads no image encoder.")
