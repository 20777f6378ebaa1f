"""Ids of ComfyUI_IPAdapter_plus: who serves them, what their sockets carry, what they compute."""

from __future__ import annotations

import json
import logging
import types
import weakref

import pytest
import torch

from tests.support.random_models import sections


@pytest.fixture
def table(pack, monkeypatch):
    """ComfyUI's table of nodes, empty."""
    import nodes

    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", {})
    monkeypatch.setattr(nodes, "NODE_DISPLAY_NAME_MAPPINGS", {})
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture
def served(pack):
    from comfyui_ip_adapter.nodes.ipadapter_plus import CLASSES

    def served(id_):
        return getattr(CLASSES[id_](), CLASSES[id_].FUNCTION)

    served.classes = CLASSES
    return served


def serve(pack):
    from comfyui_ip_adapter.nodes import ipadapter_plus

    return ipadapter_plus.serve("custom_nodes.here")


def test_every_id_is_served_once(pack, table, caplog):
    import nodes

    with caplog.at_level(logging.INFO, "comfyui_ip_adapter"):
        ids = serve(pack)
    assert len(ids) == 45 and table == ids
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS["IPAdapterMS"] == "IPAdapter Mad Scientist"
    assert {kind.RELATIVE_PYTHON_MODULE for kind in table.values()} == {"custom_nodes.here"}
    assert [record.getMessage() for record in caplog.records] == [
        "45 node ids of ComfyUI_IPAdapter_plus are served by this pack."
    ]
    assert serve(pack) == ids


def test_another_pack_keeps_its_ids(pack, table):
    other = type("Other", (), {})
    table["IPAdapterAdvanced"] = other
    ids = serve(pack)
    assert table["IPAdapterAdvanced"] is other and "IPAdapterAdvanced" not in ids
    table["IPAdapter"] = other  # loaded after us
    assert "IPAdapter" not in serve(pack) and table["IPAdapter"] is other
    assert table["IPAdapterTiled"].__module__.endswith("ipadapter_plus.apply")


@pytest.mark.parametrize("how", ["variable", "setting"])
def test_serving_is_turned_off(pack, table, how, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    if how == "variable":
        monkeypatch.setenv("IP_ADAPTER_SERVE_PLUS_IDS", "0")
    else:
        (tmp_path / "default").mkdir()
        path = tmp_path / "default" / "comfy.settings.json"
        path.write_text(json.dumps({"IPAdapter.ServeIds": False}))
    assert serve(pack) == {} and not table
    monkeypatch.setenv("IP_ADAPTER_SERVE_PLUS_IDS", "1")
    assert len(serve(pack)) == 45


def test_settings_that_cannot_be_read_leave_everything_as_it_is(pack, table, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "comfy.settings.json").write_bytes(b"\xff{")
    assert len(serve(pack)) == 45


def test_the_native_nodes_come_whatever_goes_wrong(pack, nodes, monkeypatch, caplog):
    import asyncio

    from comfyui_ip_adapter.nodes import ipadapter_plus

    monkeypatch.setattr(ipadapter_plus, "serve", lambda module: 1 / 0)

    async def listed():
        extension = await pack.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    assert len(asyncio.run(listed())) == len(nodes)
    assert "cannot be served" in caplog.text


def test_a_request_gets_what_came_later(served):
    from comfyui_ip_adapter.nodes.ipadapter_plus.requests import completed

    prompt = {
        "1": {
            "class_type": "IPAdapterAdvanced",
            "inputs": {"weight_type": "style transfer (SDXL)"},
        },
        "2": {"class_type": "IPAdapterApply", "inputs": {"weight": 0.3}},
        "3": {"class_type": "IPAdapterEncoder", "inputs": {"image_1": ["9", 0]}},
        "4": {"class_type": "KSampler", "inputs": {}},
        "5": {"class_type": "IPAdapterEncoder", "inputs": {"image": ["9", 0]}},
        "6": {"class_type": "IPAdapterWeights", "inputs": {"timing": "reverse_in_out"}},
        "7": "no node",
    }
    made = completed({"prompt": prompt, "more": 1}, served.classes)["prompt"]
    assert made["1"]["inputs"]["weight_type"] == "style transfer"
    assert made["1"]["inputs"]["embeds_scaling"] == "V only" and "model" not in made["1"]["inputs"]
    assert made["2"]["inputs"] == {
        "weight": 0.3,
        "noise": 0.0,
        "weight_type": "original",
        "start_at": 0.0,
        "end_at": 1.0,
        "unfold_batch": False,
    }
    assert made["3"]["class_type"] == "IPAdapterEncoderOfFirstVersion"
    assert made["4"]["inputs"] == {} and made["5"]["class_type"] == "IPAdapterEncoder"
    assert made["6"]["inputs"]["timing"] == "ease_in_out"
    others = {"1": {"class_type": "IPAdapterAdvanced", "inputs": {}}}
    assert completed({"prompt": others}, {})["prompt"]["1"]["inputs"] == {}
    assert completed({"prompt": None}, served.classes) == {"prompt": None}


def mapping(module):
    return sections(module.state_dict())


def test_an_adapter_of_tensors_is_made_once_for_as_long_as_they_live(small):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import adapter_of, tensors_of

    raw = mapping(small.adapter().module)
    made = adapter_of(raw)
    assert adapter_of({**raw, "faceidplusv2": False}) is made
    other = {**raw, "image_proj": {**raw["image_proj"], "norm.bias": torch.ones(64)}}
    assert adapter_of(other) is not made
    for key, tensor in made.module.state_dict().items():
        part, _, name = key.partition(".")
        assert tensor.data_ptr() == raw[part][name].data_ptr(), "no second copy of the weights"
    loaded = small.adapter(seed=3)
    assert adapter_of(tensors_of(loaded)) is loaded
    gone = weakref.ref(made.module)
    del made, raw, other, tensor
    import gc

    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("route", ["the file", "raw tensors", "adapter_modules"])
def test_what_the_model_loader_gives(served, small, folder, saved, route):
    saved(folder / "a.safetensors")
    (made,) = served("IPAdapterModelLoader")(ipadapter_file="a.safetensors")
    assert made.keys() == {"image_proj", "ip_adapter"}
    assert made["ip_adapter"]["1.to_k_ip.weight"].shape == (32, 64)
    assert served.classes["IPAdapterModelLoader"].INPUT_TYPES() == {
        "required": {"ipadapter_file": (["a.safetensors"],)}
    }


def test_the_socket_refuses_what_is_no_adapter(served, small):
    given = {"model": small.model(), "image": torch.rand(1, 28, 28, 3), "clip_vision": None}
    with pytest.raises(ValueError, match="ipadapter is a list; expected the output"):
        served("IPAdapterAdvanced")(ipadapter=[1], **given)
    with pytest.raises(ValueError, match="No IP-Adapter came in at 'ipadapter'"):
        served("IPAdapterAdvanced")(ipadapter={"ipadapter": {"model": None}}, **given)
    with pytest.raises(ValueError, match="There is no image encoder"):
        served("IPAdapterAdvanced")(ipadapter=mapping(small.adapter().module), **given)
    with pytest.raises(ValueError, match="neither an image nor embeds"):
        served("IPAdapterEmbeds")(
            small.model(), mapping(small.adapter().module), None, 1.0, "linear", 0.0, 1.0
        )


PICTURE = torch.rand(2, 28, 28, 3, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def latents(served, small, nodes, clip_vision):
    """Latents behind a served Apply node, and behind the native ones."""

    def sampled(model, batch=2):
        return small.sample(model, batch=batch)

    def behind(id_, adapter, **inputs):
        given = {"ipadapter": mapping(adapter.module), "clip_vision": clip_vision, **inputs}
        return sampled(served(id_)(model=small.model(), **given)[0])

    def native(adapter, image=PICTURE, **settings):
        prompt = nodes["IPA_EncodeImage"].execute(clip_vision, image, "center").args[0]
        return sampled(small.apply(small.model(), adapter, prompt, **settings))

    return types.SimpleNamespace(behind=behind, native=native)


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_it_computes_what_the_native_nodes_do(latents, small, variant):
    """So everything that is true of those is true of it: rows, windows, masks, the middle block."""
    adapter = small.adapter() if variant == "base" else _plus(small)
    given = {"image": PICTURE, "weight": 0.7, "start_at": 0.1, "end_at": 0.8}
    found = latents.behind("IPAdapterAdvanced", adapter, **given)
    same = {"weight": 0.7, "start_at": 0.1, "end_at": 0.8}
    assert torch.equal(found, latents.native(adapter, **same))
    found = latents.behind("IPAdapterBatch", adapter, **given)
    assert torch.equal(found, latents.native(adapter, combine="per_latent", **same))


def _plus(small):
    from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import CoreModelPatcher
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import ManagedAdapter

    sizes = {"feature_dim": small.HIDDEN, "cross_attention_dim": 64, "tokens": 3, "dim": 64}
    sizes |= {"depth": 1, "heads": 1}
    spec = AdapterSpec("plus", tuple(sizes.items()), tuple(w for _, w in small.SD15_LAYERS))
    module = IPAdapter(spec).requires_grad_(False)
    small.fill(module, 12)
    patcher = CoreModelPatcher(module, load_device=small.CPU, offload_device=small.CPU)
    return ManagedAdapter("plus.safetensors", module, patcher)


def test_like_the_old_pack(latents, small, nodes, monkeypatch):
    """Without the middle block, and beside a black picture."""
    adapter = _plus(small)
    found = latents.behind("IPAdapterAdvanced", adapter, image=PICTURE)
    monkeypatch.setenv("IP_ADAPTER_LIKE_PLUS", "yes")
    old = latents.behind("IPAdapterAdvanced", adapter, image=PICTURE)
    assert (old - found).abs().max() > 0.01
    adapter.module.ip_adapter["31"].to_v_ip.weight.data.zero_()  # the middle block is the last
    monkeypatch.setenv("IP_ADAPTER_LIKE_PLUS", "no")
    black = latents.behind(
        "IPAdapterAdvanced", adapter, image=PICTURE, image_negative=torch.zeros(1, 28, 28, 3)
    )
    torch.testing.assert_close(black, old)


def test_what_other_packs_pass_without_meaning_it(latents, small):
    adapter = small.adapter()
    plain = latents.behind("IPAdapterAdvanced", adapter, image=PICTURE)
    more = {"weight_faceidv2": False, "insightface": None, "attn_mask": False, "layer_weights": ""}
    more |= {"image_negative": None, "unheard_of": 3, "weight_type": "channel penalty"}
    assert torch.equal(latents.behind("IPAdapterAdvanced", adapter, image=PICTURE, **more), plain)
    never = {"start_at": 0.9, "end_at": 0.1}
    nothing = latents.behind("IPAdapterAdvanced", adapter, image=PICTURE, **never)
    assert torch.equal(nothing, small.sample(small.model()))


def test_native_layer_weights_say_the_same(latents, small, nodes, monkeypatch, tmp_path):
    """Scaling and precise types exist natively, as layer weights."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    adapter, layers = small.adapter(), nodes["IPA_LayerWeights"]

    def weights(preset, scaling):
        return layers.execute(small.model(), preset, "", scaling).args[0]

    cases = [
        ("linear", "uniform", "K+V"),
        ("weak middle", "weak middle", "K+mean(V) w/ C penalty"),
        ("style transfer precise", "precise style", "V only"),
        ("composition precise", "precise composition", "K+V w/ C penalty"),
    ]
    for type_, preset, scaling in cases:
        asked = {"weight": 0.7, "weight_type": type_, "embeds_scaling": scaling}
        found = latents.behind("IPAdapterAdvanced", adapter, image=PICTURE, **asked)
        given = {"weight": 0.7, "layer_weights": weights(preset, scaling)}
        torch.testing.assert_close(found, latents.native(adapter, **given))


def test_saved_embeds_are_never_written_over(served, prompts_folder, tmp_path):
    first, second = torch.rand(1, 4), torch.rand(2, 3, 4)
    for embeds in (first, second):
        served("IPAdapterSaveEmbeds")(embeds=embeds, filename_prefix="deep/er")
    written = sorted((tmp_path / "output" / "deep").iterdir())
    assert [path.name for path in written] == ["er_00001.ipadpt", "er_00002.ipadpt"]
    with pytest.raises(ValueError, match="no place inside"):
        served("IPAdapterSaveEmbeds")(embeds=first, filename_prefix="../out")
    for path in written:
        path.rename(tmp_path / "input" / path.name)
    listed = served.classes["IPAdapterLoadEmbeds"].INPUT_TYPES()["required"]["embeds"]
    assert listed == [["er_00001.ipadpt", "er_00002.ipadpt"]]
    for name, embeds in zip(listed[0], (first, second), strict=True):
        assert torch.equal(served("IPAdapterLoadEmbeds")(embeds=name)[0], embeds)
    with pytest.raises(FileNotFoundError, match=r"'gone\.ipadpt' is not in"):
        served("IPAdapterLoadEmbeds")(embeds="gone.ipadpt")


def test_embeds_that_do_not_go_together(served):
    given = {"embed1": torch.rand(1, 4), "embed2": torch.rand(1, 5), "method": "concat"}
    with pytest.raises(ValueError, match=r"found the shapes \[1, 4\], \[1, 5\]"):
        served("IPAdapterCombineEmbeds")(**given)


def test_the_converter_knows_the_native_nodes(nodes, served):
    """Sockets, widgets in the editor's order, and outputs; and the served ids' widgets."""
    from comfyui_ip_adapter.ip_adapter_core.ipadapter_plus import convert

    for id_, kind in convert.NATIVE.items():
        schema = nodes[id_].GET_SCHEMA()
        inputs = nodes[id_].INPUT_TYPES()
        found = [*inputs["required"].items(), *inputs.get("optional", {}).items()]
        drawn = ("COMBO", "FLOAT", "INT", "STRING", "BOOLEAN")
        widgets = [name for name, (type_, *_) in found if type_ in drawn]
        assert (*kind.widgets,) == (*widgets,), id_
        sockets = {name: type_ for name, (type_, *_) in found if name not in widgets}
        assert dict(kind.sockets) == sockets, id_
        assert dict(kind.outputs) == {x.id: x.io_type for x in schema.outputs}, id_
    for id_, (_, widgets) in convert._OLD.items():
        required = served.classes[id_].INPUT_TYPES()["required"]
        drawn = [n for n, (t, *_) in required.items() if not isinstance(t, str) or t == "FLOAT"]
        drawn = [n for n, (t, *_) in required.items() if n in drawn or t == "BOOLEAN"]
        assert (*drawn,) == widgets, id_


def test_it_costs_no_more_than_the_native_node(served, small, nodes, clip_vision):
    """One prompt in each layer: the same rows, tokens and dtype go into attention."""
    adapter = small.adapter()
    prompt = nodes["IPA_EncodeImage"].execute(clip_vision, PICTURE, "center").args[0]
    native = small.apply(small.model(), adapter, prompt)
    given = {"ipadapter": mapping(adapter.module), "clip_vision": clip_vision, "image": PICTURE}
    ours = served("IPAdapterAdvanced")(model=small.model(), **given)[0]
    (one,), (other,) = (model.get_attachment("ip_adapter") for model in (native, ours))
    for found, wanted in zip(other, one, strict=True):
        assert found.packed.tensor.shape == wanted.packed.tensor.shape
        assert found.masks is wanted.masks is None and found.packed.fixed is None


def test_a_preset_is_found_fast_among_many_files(real, folder, put):
    import time

    from comfyui_ip_adapter.ip_adapter_core.comfyui.ipadapter_plus import find
    from comfyui_ip_adapter.ip_adapter_core.ipadapter_plus.presets import preset_of
    from comfyui_ip_adapter.nodes import paths

    names = [f"other {number:02}.safetensors" for number in range(49)]
    put({**dict.fromkeys(names, "sd15"), "ip-adapter-plus_sd15.safetensors": "sd15_plus"})
    encoder = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
    from tests.support import sparse_files as sparse

    put(image_encoders={encoder: sparse.vision()})
    find(real["SD1.5"], preset_of("STANDARD"), paths.adapters(), paths.encoders())
    begun = time.perf_counter()
    found = find(real["SD1.5"], preset_of("PLUS"), paths.adapters(), paths.encoders())
    assert [file.name for file in found] == ["ip-adapter-plus_sd15.safetensors", encoder]
    assert time.perf_counter() - begun < 0.2
    renamed = folder / "renamed.safetensors"
    (folder / "ip-adapter-plus_sd15.safetensors").rename(renamed)
    found = find(real["SD1.5"], preset_of("PLUS"), paths.adapters(), paths.encoders())
    assert found[0].name == "renamed.safetensors", "found by what is in it"


def test_the_first_ids_had_the_middle_block(served, small, clip_vision, monkeypatch):
    given = {"ipadapter": mapping(small.adapter().module), "clip_vision": clip_vision}
    given |= {"image": PICTURE[:1], "weight": 0.9, "weight_type": "original"}

    def found(id_):
        return small.sample(served(id_)(model=small.model(), **given)[0])

    first, later = found("IPAdapterApply"), found("IPAdapterAdvanced")
    torch.testing.assert_close(first, later)
    monkeypatch.setenv("IP_ADAPTER_LIKE_PLUS", "1")
    torch.testing.assert_close(found("IPAdapterApply"), first)
    assert (found("IPAdapterAdvanced") - later).abs().max() > 1e-3


@pytest.mark.parametrize("flag, shortcut", [({}, 0), ({"faceidplusv2": True}, 1)])
def test_a_mapping_without_a_name_says_which_version_it_is(pack, small, flag, shortcut):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import tensors_of
    from comfyui_ip_adapter.nodes.ipadapter_plus.sockets import models

    from tests.support import faces

    widths = [width for _, width in small.SD15_LAYERS]
    raw = sections(faces.tensors("faceid-plus-v2", widths, 768, hidden=small.HIDDEN))
    adapter = models(raw | flag).adapter
    assert adapter.spec.sizes["shortcut"] == shortcut
    assert tensors_of(adapter).get("faceidplusv2", False) is bool(shortcut)


def test_features_of_faces_are_no_embeds(served, small, clip_vision):
    from tests.support import faces

    widths = [width for _, width in small.SD15_LAYERS]
    raw = sections(faces.tensors("faceid", widths, small.CONTEXT))
    with pytest.raises(ValueError, match="reads faces, which are no EMBEDS"):
        served("IPAdapterEncoder")(raw, PICTURE, 1.0, clip_vision=clip_vision)


def test_which_file_nobody_guesses(pack, served):
    from comfyui_ip_adapter.nodes.ipadapter_plus.requests import completed

    nodes = {"1": {"class_type": "IPAdapterUnifiedLoader", "inputs": {"model": ["2", 0]}},
             "2": {"class_type": "IPAdapterModelLoader", "inputs": {}}}  # fmt: skip
    made = completed({"prompt": json.loads(json.dumps(nodes))}, served.classes)
    assert made["prompt"] == nodes
