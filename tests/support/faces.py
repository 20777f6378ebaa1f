"""Random FaceID adapters in their files' layouts; ONNX models with SCRFD's and ArcFace's ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ip_adapter_core.adapter import AdapterSpec, IPAdapter
from tools import reference_images

RANK = 8


def spec(kind: str, widths: Sequence[int], context: int, hidden: int = 56) -> AdapterSpec:
    """Return the layout of a kind of face adapter; `hidden`: width of the crop's states."""
    face = {"feature_dim": 512, "cross_attention_dim": context, "tokens": 4, "hidden": 1024}
    if kind == "portrait":
        return AdapterSpec("faceid", tuple({**face, "tokens": 16}.items()), tuple(widths))
    if kind == "faceid-unnorm":
        sizes = {"feature_dim": 512, "cross_attention_dim": context, "tokens": 16, "dim": 64}
        sizes |= {"depth": 4, "heads": 1, "expansion": 4}
        return AdapterSpec("faceid-unnorm", tuple(sizes.items()), tuple(widths))
    if kind.startswith("faceid-plus"):
        sizes = {**face, "feature_dim": hidden, "face_dim": 512, "depth": 4, "heads": 1}
        sizes |= {"expansion": 4, "shortcut": int(kind == "faceid-plus-v2")}
        return AdapterSpec("faceid-plus", tuple(sizes.items()), tuple(widths))
    return AdapterSpec("faceid", tuple(face.items()), tuple(widths))


def tensors(kind: str, widths: Sequence[int], context: int, seed: int = 0, **more: int) -> Any:
    """Return a file's tensors, LoRA included where the published ones have it."""
    generator = torch.Generator().manual_seed(seed)
    made = IPAdapter(spec(kind, widths, context, **more))
    state = {}
    for key, tensor in made.state_dict().items():
        fan = tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 1.0
        gain = 2.0 if "_ip." in key else 1.0
        values = torch.randn(tensor.shape, generator=generator) * gain / fan
        state[key] = values + 1 if "norm" in key and key.endswith("weight") else values
    if kind in ("faceid", "faceid-plus-v1", "faceid-plus-v2"):
        state |= lora(widths, context, generator)
    if kind == "faceid-unnorm":
        state = {k: x.half() if k.startswith("ip_adapter") else x for k, x in state.items()}
    return state


def lora(widths: Sequence[int], context: int, generator: torch.Generator) -> dict[str, Tensor]:
    made = {}
    for i, width in enumerate(widths):
        for number, into in ((2 * i, width), (2 * i + 1, context)):
            for part, size in (("q", width), ("k", into), ("v", into), ("out", width)):
                name = f"ip_adapter.{number}.to_{part}_lora"
                down = torch.randn(RANK, size, generator=generator) / size**0.5
                up = torch.randn(width, RANK, generator=generator) / RANK**0.5
                made[f"{name}.down.weight"], made[f"{name}.up.weight"] = down, up * 0.5
    return made


def merge_lora(unet: Any, state: Mapping[str, Tensor], weight: float = 1.0) -> None:
    """Add a file's LoRA to the weights of diffusers' UNet."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    for number, name in enumerate(names):
        for part in ("q", "k", "v", "out"):
            key = f"ip_adapter.{number}.to_{part}_lora"
            if f"{key}.up.weight" not in state:
                continue
            module = unet.get_submodule(f"{name}.to_{part}" + (".0" if part == "out" else ""))
            change = state[f"{key}.up.weight"] @ state[f"{key}.down.weight"]
            module.weight = torch.nn.Parameter(module.weight + weight * change, False)


def write_pack(folder: Path, seed: int = 0, confident: float = 0.0) -> Path:
    """Write a random model pack: SCRFD's and ArcFace's inputs and outputs, and few weights.

    `confident`: added to what scores are made of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    detector, recognizer_ = _detector(np.random.default_rng(seed), confident), recognizer(seed + 1)
    (folder / "det_10g.onnx").write_bytes(detector)
    (folder / "w600k_r50.onnx").write_bytes(recognizer_)
    return folder


def _detector(rng: Any, confident: float) -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, outputs = [], [], []

    def constant(name: str, array: Any) -> str:
        weights.append(numpy_helper.from_array(array, name))
        return name

    for place, (what, size) in enumerate((("score", 1), ("box", 4), ("points", 10))):
        for stride in (8, 16, 32):
            name = f"{what}_{stride}"
            kernel = rng.normal(size=(2 * size, 3, stride, stride)) / stride
            if what == "score":
                kernel = kernel * 1.5
            bias = np.full(2 * size, confident - 1.5 if what == "score" else 2.0)
            if what == "points":
                bias = rng.normal(size=2 * size) * 2
            given = [
                "image",
                constant(f"{name}.w", kernel.astype(np.float32)),
                constant(f"{name}.b", bias.astype(np.float32)),
            ]
            nodes.append(helper.make_node("Conv", given, [f"{name}.c"], strides=[stride, stride]))
            last = f"{name}.c"
            if what != "points":
                kind = "Sigmoid" if what == "score" else "Relu"
                nodes.append(helper.make_node(kind, [last], [f"{name}.a"]))
                last = f"{name}.a"
            nodes.append(helper.make_node("Transpose", [last], [f"{name}.t"], perm=[0, 2, 3, 1]))
            shape = constant(f"{name}.shape", np.array([-1, size], np.int64))
            nodes.append(helper.make_node("Reshape", [f"{name}.t", shape], [name]))
            outputs.append(
                (place, helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size]))
            )
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, None, None])
    return _model(onnx, nodes, [image], [x for _, x in outputs], weights)


def drawn_detector() -> bytes:
    """Return a detector of one face as `tools.reference_images` draws them, by its colours."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights = [], []

    def op(kind: str, *given: Any, **attributes: Any) -> str:
        names = [x if isinstance(x, str) else constant(x) for x in given]
        nodes.append(helper.make_node(kind, names, [f"value {len(nodes)}"], **attributes))
        return f"value {len(nodes) - 1}"

    def constant(x: Any) -> str:
        array = np.asarray(x)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        weights.append(numpy_helper.from_array(array, f"constant {len(weights)}"))
        return f"constant {len(weights) - 1}"

    def total(values: str, *axes: int) -> str:
        return op("ReduceSum", values, [*axes], keepdims=0)

    def line(count: str) -> str:
        return op("Cast", op("Range", 0, count, 1), to=TensorProto.FLOAT)

    def part(color: tuple[int, int, int]) -> str:
        level = (np.float32(color).reshape(3, 1, 1) - 127.5) / 128
        near = op("Less", total(op("Abs", op("Sub", "image", level)), 0, 1), 0.2)
        return op("Cast", near, to=TensorProto.FLOAT)

    def center(mask: str) -> tuple[str, str]:
        sums = (op("Mul", total(mask, axis), pixels) for axis in (0, 1))
        x, y = (op("Div", total(each, 0), total(mask, 0, 1)) for each in sums)
        return x, y

    side = op("Gather", op("Shape", "image"), 3)
    pixels = line(side)
    eyes, mouth = part(reference_images.EYES), part(reference_images.MOUTH)
    left = op("Cast", op("Less", pixels, center(eyes)[0]), to=TensorProto.FLOAT)
    one, other = center(op("Mul", eyes, left)), center(op("Mul", eyes, op("Sub", 1.0, left)))
    nose, (_, lips) = center(part(reference_images.NOSE)), center(mouth)
    filled = op("Greater", total(mouth, 0), 0.0)
    ends = (op(f"Reduce{way}", op("Where", filled, pixels, far), keepdims=0)
            for way, far in (("Min", 1e6), ("Max", -1e6)))  # fmt: skip
    five = [*one, *other, *nose, *(place for end in ends for place in (end, lips))]
    points = op("Concat", *(op("Unsqueeze", x, [0]) for x in five), axis=0)
    middle, apart = op("Slice", points, [4], [6]), op("Sub", other[0], one[0])
    low = op("Sub", middle, op("Mul", apart, [1.15, 1.6]))
    high = op("Add", middle, op("Mul", apart, [1.15, 1.2]))
    found = op("Cast", op("Greater", apart, 0.0), to=TensorProto.FLOAT)
    outputs: list[list[Any]] = [[], [], []]
    for stride in (8, 16, 32):
        count = op("Div", side, stride)
        grid = op("Concat", *[op("Unsqueeze", count, [0])] * 2, [2], axis=0)
        along = op("Mul", line(count), float(stride))
        x, y = (
            op("Reshape", op("Expand", op("Unsqueeze", along, axes), grid), [-1, 1])
            for axes in ((0, 2), (1, 2))
        )
        at = op("Concat", x, y, axis=1)
        box = op("Concat", op("Sub", at, low), op("Sub", high, at), axis=1)
        away = op("Sub", points, op("Tile", at, [1, 5]))
        scaled = (op("Div", each, float(stride)) for each in (box, away))
        score = op("Add", op("Mul", x, 0.0), found)
        for kind, name, size in zip(outputs, (score, *scaled), (1, 4, 10), strict=True):
            kind.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, None, None])
    return _model(onnx, nodes, [image], [x for kind in outputs for x in kind], weights)


def recognizer(seed: int = 0) -> bytes:
    """Return a random model with ArcFace's input and output."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(16, 3, 8, 8)).astype(np.float32) / 8
    matrix = rng.normal(size=(512, 16 * 14 * 14)).astype(np.float32) / 56
    weights = [numpy_helper.from_array(x, n) for x, n in ((kernel, "k"), (matrix, "m"))]
    nodes = [
        helper.make_node("Conv", ["data", "k"], ["c"], strides=[8, 8]),
        helper.make_node("Tanh", ["c"], ["a"]),
        helper.make_node("Flatten", ["a"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["embedding"], transB=1),
    ]
    data = helper.make_tensor_value_info("data", TensorProto.FLOAT, [None, 3, 112, 112])
    out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [None, 512])
    return _model(onnx, nodes, [data], [out], weights)


def _model(onnx: Any, nodes: Any, inputs: Any, outputs: Any, weights: Any) -> bytes:
    graph = onnx.helper.make_graph(nodes, "face", inputs, outputs, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
