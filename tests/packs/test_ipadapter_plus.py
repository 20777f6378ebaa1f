"""Served ids beside the pack that they come from: the same latents, pixels and numbers."""

from __future__ import annotations

import functools
import io
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.packs import conftest
from tests.packs.conftest import nodes_of
from tests.support import checkpoint_layouts as layouts
from tests.support import faces
from tests.support.random_models import sections

OLD = "ComfyUI_IPAdapter_plus"
TYPES = [
    *("linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input"),
    *("weak output", "weak middle", "strong middle", "style transfer", "composition"),
    *("strong style transfer", "style and composition", "style transfer precise"),
    "composition precise",
]
SCALINGS = ["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
COMBINE = ["concat", "add", "subtract", "average", "norm average"]
FAMILIES = ["sd15", "sdxl"]
EMBED, HIDDEN, POSITIONS = 25, 20, 17


@pytest.fixture(scope="session")
def sized(pack):
    """Narrow SD1.5 and SDXL, as deep as they are and with the text states that tell them apart."""
    from tests.sampling import small

    wide = {**small.LEVEL, "context": 2048}
    small.CONFIGS["sdxl of 2048"] = replace(layouts.SDXL, **wide, heads=(2, 4, 8)).comfy_config()
    small.LAYERS["sdxl of 2048"] = small.LAYERS["sdxl70"]
    return small


@functools.cache
def _model(sized, family):
    return sized._model("sdxl of 2048" if family == "sdxl" else "sd15", torch.float32, None, 0)


@pytest.fixture
def old(use):
    """The old pack's node of an id: its Python method."""

    def old(id_):
        node = nodes_of(OLD)[id_]
        made = node()
        return getattr(made, node.FUNCTION)

    use(OLD, "IPAdapterCombineWeights", weights_1=1.0, weights_2=1.0)
    return old


@pytest.fixture(scope="session")
def ours(pack):
    from comfyui_ip_adapter.nodes.ipadapter_plus import CLASSES

    def ours(id_):
        return getattr(CLASSES[id_](), CLASSES[id_].FUNCTION)

    return ours


@pytest.fixture
def like_the_old(monkeypatch):
    monkeypatch.setenv("IP_ADAPTER_LIKE_PLUS", "1")


@pytest.fixture(scope="session")
def encoder(sized):
    return sized.clip_vision(EMBED, HIDDEN, side=224, patch=56)


@pytest.fixture(scope="session")
def adapters(sized):
    """Mappings of tensors, as the socket carries them."""

    @functools.cache
    def made(family, variant):
        width = 2048 if family == "sdxl" else 64
        sizes = {
            "base": {"feature_dim": EMBED, "cross_attention_dim": width, "tokens": 4},
            "full": {"feature_dim": HIDDEN, "cross_attention_dim": width},
            "plus": {
                "feature_dim": HIDDEN,
                "cross_attention_dim": width,
                "tokens": 16,
                "dim": 1280 if family == "sdxl" else width,
                "depth": 4,
                "heads": 20 if family == "sdxl" else 12,
            },
        }[variant]
        from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter

        widths = tuple(w for _, w in sized.LAYERS["sdxl70" if family == "sdxl" else "sd15"])
        module = IPAdapter(AdapterSpec(variant, tuple(sizes.items()), widths)).requires_grad_(False)
        sized.fill(module, seed=10)
        return sections(module.state_dict())

    return made


def pictures(count=1, height=96, width=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear").movedim(1, -1)


def text(sized, family, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    width = 2048 if family == "sdxl" else 64
    states = torch.randn(1, 77, width, generator=generator)
    return [[states, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


@pytest.fixture
def compare(sized, old, ours, adapters, encoder, like_the_old):
    """Sample behind both packs' node of an id; the latents must be the same."""

    def compare(
        id_, family="sd15", variant="base", batch=2, size=8, tolerance=1e-4, at=(0.3, 0.6), **inputs
    ):
        texts = text(sized, family, 1), text(sized, family, 2)
        latents = []
        for call in (None, old(id_), ours(id_)):
            model = _model(sized, family).clone()
            if call is not None:
                given = {"clip_vision": encoder, "ipadapter": adapters(family, variant), **inputs}
                model = call(model=model, **given)[0]
            torch.manual_seed(0)
            latents.append(sized.run(sized.guider(model, *texts), at=at, batch=batch, size=size))
        without, wanted, found = latents
        effect = float((wanted - without).abs().max())
        error = float((found - wanted).abs().max())
        if effect < 1e-3 * float(without.std()):
            assert error < 1e-5, f"no effect there, {error:.1e} here"
            return
        assert error / effect < tolerance, f"relative error {error / effect:.1e}"

    return compare


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_type_and_a_scaling(compare, family, weight_type, scaling):
    given = {"weight": 0.8, "weight_type": weight_type, "embeds_scaling": scaling}
    compare("IPAdapterAdvanced", family, image=pictures(), **given)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("variant", ["base", "plus", "full"])
def test_how_images_are_combined(compare, variant, combine):
    compare("IPAdapterAdvanced", "sd15", variant, image=pictures(3), combine_embeds=combine)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("combine", ["concat", "average"])
def test_several_images_and_a_scaling(compare, combine, scaling):
    given = {"combine_embeds": combine, "embeds_scaling": scaling, "weight": 0.7}
    compare("IPAdapterAdvanced", image=pictures(2), image_negative=pictures(1, seed=5), **given)


@pytest.mark.parametrize("count, batch", [(1, 3), (2, 3), (3, 3), (4, 3)])
@pytest.mark.parametrize("weight", [0.7, [0.2, 0.9], [0.2, 0.9, 0.0, 1.5]])
def test_one_image_for_each_latent(compare, count, batch, weight):
    given = {"image": pictures(count), "weight": weight, "batch": batch}
    compare("IPAdapterBatch", image_negative=pictures(2, seed=7), **given)


@pytest.mark.parametrize(
    "weight_type", ["ease in", "style and composition", "style transfer precise"]
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_list_of_weights_with_each_scaling(compare, scaling, weight_type):
    given = {"weight": [0.2, 0.9], "embeds_scaling": scaling, "weight_type": weight_type}
    compare("IPAdapterBatch", image=pictures(2), **given)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_masks(compare, count):
    mask = torch.zeros(count, 64, 64)
    for number in range(count):
        mask[number, 10 * number : 40 + 10 * number, 8:50] = 1
    compare("IPAdapterAdvanced", image=pictures(), attn_mask=mask, size=16)
    compare("IPAdapterBatch", image=pictures(2), attn_mask=mask, size=(8, 16))


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.4, 1.0), (0.9, 0.2)])
def test_windows(compare, window):
    start, end = window
    compare("IPAdapterAdvanced", image=pictures(), start_at=start, end_at=end)


def test_a_list_of_weights_without_a_batch(compare):
    compare("IPAdapterAdvanced", image=pictures(), weight=[0.3, 0.9])


@pytest.mark.parametrize("type_", ["standard", "prompt is more important", "style transfer"])
def test_the_simple_node(sized, old, ours, adapters, encoder, like_the_old, type_):
    pipeline = {
        "clipvision": {"file": None, "model": encoder},
        "ipadapter": {"file": "x", "model": adapters("sd15", "plus")},
    }
    texts = text(sized, "sd15", 1), text(sized, "sd15", 2)
    latents = []
    for call in (old("IPAdapter"), ours("IPAdapter")):
        model = _model(sized, "sd15").clone()
        model = call(model, pipeline, pictures(), 0.9, 0.0, 1.0, type_, attn_mask=None)[0]
        latents.append(sized.run(sized.guider(model, *texts)))
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [(96, 96), (64, 128), (40, 200), (150, 90)])
def test_tiles(compare, old, ours, adapters, encoder, sized, ratio):
    given = {"weight": 0.8, "weight_type": "linear", "start_at": 0.0, "end_at": 1.0}
    image = pictures(2, *ratio)
    compare("IPAdapterTiled", image=image, sharpening=0.4, **given)
    mask = torch.zeros(1, 50, 50)
    mask[:, :25] = 1
    more = {"clip_vision": encoder, "ipadapter": adapters("sd15", "base"), "attn_mask": mask}
    made = [
        call(model=_model(sized, "sd15").clone(), image=image, sharpening=0.4, **given, **more)[1:]
        for call in (old("IPAdapterTiled"), ours("IPAdapterTiled"))
    ]
    for wanted, found in zip(*made, strict=True):
        assert wanted.shape == found.shape
        assert torch.equal(found, wanted)
    compare("IPAdapterTiledBatch", image=image, sharpening=0.0, **given)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("id_", ["IPAdapterStyleComposition", "IPAdapterStyleCompositionBatch"])
def test_style_and_composition(compare, id_, expand):
    given = {"weight_style": 0.7, "weight_composition": 1.3, "expand_style": expand}
    images = {"image_style": pictures(2), "image_composition": pictures(2, seed=3)}
    for combine in ("average", "concat"):
        compare(id_, "sdxl", **given, **images, combine_embeds=combine)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", ["V only", "K+mean(V) w/ C penalty"])
@pytest.mark.parametrize("kind", ["StyleTransfer", "Composition"])
def test_the_precise_nodes(compare, kind, scaling, family):
    boost = {"style_boost": 1.6} if kind == "StyleTransfer" else {"composition_boost": 0.4}
    for behind in ("", "Batch"):
        given = {"weight": 0.8, "embeds_scaling": scaling, **boost}
        compare(f"IPAdapterPrecise{kind}{behind}", family, image=pictures(2), **given)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_type", ["linear", "style transfer precise", "composition precise"])
def test_the_mad_scientist(compare, family, weight_type):
    given = {"weight": 0.8, "weight_type": weight_type, "layer_weights": "3:0.8, 6:0.35, 0:1.2,4:1"}
    compare("IPAdapterMS", family, image=pictures(), **given)


@pytest.mark.parametrize("variant", ["base", "plus"])
@pytest.mark.parametrize("count, grid, ratio", [(1, 2, 0.8), (2, 3, 0.6), (1, 1, 1.0)])
def test_the_enhancer(compare, variant, count, grid, ratio):
    given = {"enhance_tiles": grid, "enhance_ratio": ratio, "combine_embeds": "average"}
    for id_ in ("IPAdapterClipVisionEnhancer", "IPAdapterClipVisionEnhancerBatch"):
        compare(id_, "sd15", variant, image=pictures(count), **given)


@pytest.mark.parametrize("variant", ["base", "plus", "full"])
def test_embeds(sized, old, ours, adapters, encoder, compare, variant):
    ipadapter = adapters("sd15", variant)
    mask = torch.zeros(1, 60, 80)
    mask[:, 20:] = 1
    for given in ({}, {"mask": mask}):
        made = [
            call(ipadapter=ipadapter, image=pictures(2), weight=1.4, clip_vision=encoder, **given)
            for call in (old("IPAdapterEncoder"), ours("IPAdapterEncoder"))
        ]
        for wanted, found in zip(*made, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    positive, negative = made[0]
    methods = [*COMBINE, "max", "min"]
    for method in methods:
        pair = [
            call(embed1=positive, method=method, embed3=positive * 0.3)[0]
            for call in (old("IPAdapterCombineEmbeds"), ours("IPAdapterCombineEmbeds"))
        ]
        torch.testing.assert_close(pair[1], pair[0])
    given = {"weight": 0.8, "weight_type": "linear", "start_at": 0.0, "end_at": 1.0}
    compare("IPAdapterEmbeds", "sd15", variant, pos_embed=positive, neg_embed=negative, **given)
    compare("IPAdapterEmbeds", "sd15", variant, pos_embed=positive, **given)
    compare("IPAdapterEmbedsBatch", "sd15", variant, pos_embed=positive, **given)


def test_regions(compare, old, ours):
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    made = []
    for nodes in (old, ours):
        one = nodes("IPAdapterRegionalConditioning")(
            pictures(), 0.8, 1.0, "linear", 0.0, 0.7, mask=mask
        )[0]
        other = nodes("IPAdapterRegionalConditioning")(
            pictures(seed=4), 0.6, 1.0, "ease in", 0.2, 1.0, mask=1 - mask
        )[0]
        made.append(nodes("IPAdapterCombineParams")(one, other)[0])
    compare("IPAdapterFromParams", ipadapter_params=made[0], size=16)
    assert made[0].keys() == made[1].keys()


NOISES = itertools.product(["fade", "dissolve", "gaussian", "shuffle"], [0.3, 1.0], [0, 5, 6])


@pytest.mark.parametrize("kind, strength, blur", NOISES)
def test_noise_to_the_pixel(old, ours, kind, strength, blur):
    for image in (pictures(2, 100, 70), None):
        before = torch.random.get_rng_state()
        found = ours("IPAdapterNoise")(kind, strength, blur, image)[0]
        assert torch.equal(before, torch.random.get_rng_state())
        wanted = old("IPAdapterNoise")(kind, strength, blur, image)[0]
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("crop", ["top", "bottom", "left", "right", "center", "pad"])
@pytest.mark.parametrize("interpolation", ["LANCZOS", "BICUBIC", "NEAREST"])
def test_prepared_pictures_to_the_pixel(old, ours, interpolation, crop):
    for size, sharpening in (((300, 201), 0.0), ((120, 333), 0.35), ((64, 64), 1.0)):
        given = pictures(2, *size), interpolation, crop, sharpening
        wanted, found = (node("PrepImageForClipVision")(*given)[0] for node in (old, ours))
        assert wanted.shape == found.shape
        assert torch.equal(found, wanted)


TIMINGS = ["custom", "linear", "ease_in_out", "ease_in", "ease_out"]


@pytest.mark.parametrize("method", ["full batch", "shift batches", "alternate batches"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_weights_over_frames(old, ours, timing, method):
    for count, start, end, before, after in ((3, 0, 9999, 0, 0), (4, 2, 6, 2, 3)):
        image = pictures(count, 8, 8)
        given = {"weights": "0.1, 0.5\n0.9", "timing": timing, "frames": 7, "method": method}
        given |= {"start_frame": start, "end_frame": end}
        given |= {"add_starting_frames": before, "add_ending_frames": after}
        for picture in (None, image):
            wanted, found = (
                node("IPAdapterWeights")(**given, image=picture) for node in (old, ours)
            )
            assert found[0] == pytest.approx(wanted[0])
            assert found[1] == pytest.approx(wanted[1]) and found[2] == wanted[2]
            for one, other in zip(wanted[3:5], found[3:5], strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)
            assert wanted[5] == found[5]
            again = ours("IPAdapterWeightsFromStrategy")(weights_strategy=wanted[5], image=picture)
            assert again[0] == found[0]
            prompts = (
                node("IPAdapterPromptScheduleFromWeightsStrategy")(wanted[5], "a\n\nb\nc")[0]
                for node in (old, ours)
            )
            assert next(prompts) == next(prompts)


def _ids():
    from comfyui_ip_adapter.nodes.ipadapter_plus import CLASSES

    return [id_ for id_ in CLASSES if id_ in nodes_of(OLD)]


def test_every_id_has_the_same_interface(use):
    import inspect

    from comfyui_ip_adapter.nodes.ipadapter_plus import CLASSES, DISPLAY_NAMES

    use(OLD, "IPAdapterCombineWeights", weights_1=1.0, weights_2=1.0)
    theirs = nodes_of(OLD)
    assert len(theirs) == 37 and theirs.keys() <= CLASSES.keys()
    for id_, node in theirs.items():
        ours = CLASSES[id_]
        wanted, found = node.INPUT_TYPES(), ours.INPUT_TYPES()
        for kind in ("required", "optional"):
            assert [*found.get(kind, {})] == [*wanted.get(kind, {})], id_
            for name, given in wanted.get(kind, {}).items():
                assert [*found[kind][name]] == [*given], (id_, name)
        assert tuple(ours.RETURN_TYPES) == tuple(node.RETURN_TYPES), id_
        names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
        assert tuple(getattr(ours, "RETURN_NAMES", ours.RETURN_TYPES)) == tuple(names), id_
        assert (ours.FUNCTION, ours.CATEGORY) == (node.FUNCTION, node.CATEGORY), id_
        assert getattr(ours, "OUTPUT_NODE", False) == getattr(node, "OUTPUT_NODE", False)
        their_call, our_call = (
            inspect.signature(getattr(kind, kind.FUNCTION)).parameters for kind in (node, ours)
        )
        kept = [name for name in our_call if name in their_call]
        assert kept == [*their_call], f"{id_}: other packs pass these by position"
        assert DISPLAY_NAMES[id_]


EXAMPLES = [
    *("simple", "advanced", "combine_embeds", "weight_types", "weighted_embeds"),
    *("negative_image", "noise_injection", "tiled", "weights", "style_composition"),
    *("precise_weight_type", "precise_composition", "cosxl_edit"),
]
STANDINS = {
    "CheckpointLoaderSimple": lambda name: (
        "sd_xl_base_1.0.safetensors"
        if name.startswith(("sdxl", "cosxl"))
        else "v1-5-pruned-emaonly-fp16.safetensors"
    ),
    "CLIPVisionLoader": lambda name: "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    "LoadImage": lambda name: "small.png",
}
SMALL = {
    "EmptyLatentImage": lambda values: [64, 64, values[2]],
    "KSampler": lambda values: [*values[:2], 1, *values[3:]],
    "BasicScheduler": lambda values: [values[0], 1, values[2]],
    "ImageScale": lambda values: [values[0], 64, 64, *values[3:]],
    "RepeatLatentBatch": lambda values: [1],
}


def example(name):
    """Return an example of the old pack, on stand-ins and small."""
    path = conftest.found(OLD) / "examples" / f"ipadapter_{name}.json"
    workflow = json.loads(path.read_text("utf-8"))
    for node in workflow["nodes"]:
        if node["type"] in STANDINS:
            node["widgets_values"][0] = STANDINS[node["type"]](node["widgets_values"][0])
        if node["type"] in SMALL:
            node["widgets_values"] = SMALL[node["type"]](node["widgets_values"])
    return workflow


@pytest.fixture(scope="module")
def opened(client, models_sdxl, page):
    """Requests of the examples as they are and rewritten, made by ComfyUI's editor."""
    made = {}
    with Image.open(models_sdxl / "input" / "reference.png") as picture:
        picture.convert("RGB").resize((64, 64)).save(models_sdxl / "input" / "small.png")
    for name in EXAMPLES:
        workflow = example(name)
        for kind in ("old", "new"):
            if kind == "new":
                page.evaluate("app.extensionManager.command.execute('IPAdapter.Rewrite')")
                page.wait_for_function("app.graph._nodes.some((n) => n.type.startsWith('IPA'))")
                page.wait_for_timeout(500)
            else:
                page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
            missing = page.evaluate(
                "app.graph._nodes.filter((n) => !(n.type in LiteGraph.registered_node_types))"
                ".map((n) => n.type)"
            )
            assert [*{*missing} - {"Note", "Reroute"}] == [], name
            request = page.evaluate("async () => (await app.graphToPrompt()).output")
            made[name, kind] = request
    return made


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_open_run_and_are_rewritten(opened, client, name):
    pictures = []
    for kind in ("old", "new"):
        request = opened[name, kind]
        with ThreadPoolExecutor(1) as pool:  # the page's thread has an event loop that runs
            images = pool.submit(client.run, request).result().images
        drawn = [id_ for id_ in sorted(images) if request[id_]["class_type"] != "IPA_LayerWeights"]
        files = [data for id_ in drawn for data in images[id_]]
        pictures.append([np.asarray(Image.open(io.BytesIO(data))) for data in files])
    assert pictures[0] and len(pictures[0]) == len(pictures[1])
    for one, other in zip(*pictures, strict=True):
        assert np.array_equal(one, other)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """insightface itself, over random models of its pack's inputs and outputs."""
    app = pytest.importorskip("insightface.app", reason="`pip install insightface onnx`")
    pytest.importorskip("onnx")
    root = tmp_path_factory.mktemp("insightface")
    faces.write_pack(root / "models" / "buffalo_l")
    made = app.FaceAnalysis(name="buffalo_l", root=str(root), providers=["CPUExecutionProvider"])
    made.prepare(ctx_id=0, det_size=(640, 640))
    return made


def face_adapter(sized, family, kind):
    width = 2048 if family == "sdxl" else 64
    widths = [w for _, w in sized.LAYERS["sdxl70" if family == "sdxl" else "sd15"]]
    parts: dict = sections(faces.tensors(kind, widths, width, hidden=HIDDEN))
    if kind.endswith("v2"):
        parts["faceidplusv2"] = True
    return parts


@pytest.mark.nightly  # insightface describes every face that a random detector finds
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["faceid", "portrait", "faceid-plus-v2"])
@pytest.mark.parametrize("id_", ["IPAdapterFaceID", "IPAAdapterFaceIDBatch"])
def test_faces(compare, sized, analysis, family, kind, id_):
    given = {"weight": 0.8, "weight_faceidv2": 1.6, "insightface": analysis}
    given |= {"ipadapter": face_adapter(sized, family, kind), "image": pictures(2, 64, 64)}
    plus = kind == "faceid-plus-v2"
    if plus and family == "sdxl":
        pytest.skip("the old pack's projection has the heads of the real width")
    # opencv rounds a crop's pixels its own way, which a random encoder reads as much as 1 % off
    given |= {"tolerance": 0.1} if plus else {}
    combined = id_ == "IPAdapterFaceID"
    for combine in ("concat", "average", "add", "subtract", "norm average")[: 5 if combined else 1]:
        compare(id_, family, combine_embeds=combine, **given)
