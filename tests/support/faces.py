"""Random FaceID adapters in their files' layouts, and random ONNX models of SCRFD and ArcFace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ip_adapter_core.adapter import AdapterSpec, IPAdapter

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
    _detector(folder / "det_10g.onnx", np.random.default_rng(seed), confident)
    _recognizer(folder / "w600k_r50.onnx", np.random.default_rng(seed + 1))
    return folder


def _detector(path: Path, rng: Any, confident: float) -> None:
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
    graph = helper.make_graph(nodes, "scrfd", [image], [x for _, x in outputs], weights)
    _save(onnx, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def _recognizer(path: Path, rng: Any) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

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
    graph = helper.make_graph(nodes, "arcface", [data], [out], weights)
    _save(onnx, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def _save(onnx: Any, model: Any, path: Path) -> None:
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
