"""Files that are no usable adapter: each is refused with what was found and what was expected."""

from __future__ import annotations

import math
import os
import pickle
import re
import traceback

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.files.adapter_file import CheckpointError, load
from safetensors.torch import save, save_file

from tests.support.checkpoint_layouts import (
    dense,
    full_projection,
    ip_adapter,
    linear_projection,
    norm,
    resampler,
)
from tests.support.random_models import under
from tests.support.random_models import weights as random_weights

LINEAR = ip_adapter(linear_projection(24, 16), (8, 16, 8), 16)
RESAMPLER = ip_adapter(resampler(24, 16, 64), (8, 16, 8), 16)
MLP = ip_adapter(full_projection(24, 16), (8, 16, 8), 16)
K3 = "ip_adapter.3.to_k_ip.weight"
NAMED = "'bad.bin'"


def refused(path):
    with pytest.raises(CheckpointError) as error:
        load(path)
    return str(error.value)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", ["empty (0 bytes)", "Download it again"]),
        (b"\n<!DOCTYPE html><html>Log in</html>", ["web page", "login page"]),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            ["git-lfs", "git lfs pull"],
        ),
        (b'{"error": "Entry not found"}', ["neither a safetensors", '{"error": "Entry']),
        (b"Access to model x is restricted", ["neither a safetensors", "Access to model"]),
        (b"PK\x03\x04" + bytes(100), ["cannot be read as a torch file"]),
        (b"\x80\x02" + bytes(range(60)), ["damaged, or holds other objects", "Download it again"]),
        (b"\x10" + bytes(7) + b'{"a": 1}' * 4, ["damaged safetensors"]),
    ],
)
def test_what_is_no_checkpoint(content, said, tmp_path):
    (tmp_path / "bad.bin").write_bytes(content)
    message = refused(tmp_path / "bad.bin")
    assert all(words in message for words in [NAMED, *said]), message


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch before 1.6"])
def test_truncated_files(kind, keep, tmp_path):
    path, weights = tmp_path / "bad.bin", random_weights(LINEAR)
    if kind == "safetensors":
        path.write_bytes(save(weights))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "torch")
    data = path.read_bytes()
    load(path)
    path.write_bytes(data[: int(keep * len(data))])
    message = refused(path)
    assert NAMED in message
    assert "cut short" in message


def test_no_file_and_a_folder(tmp_path):
    assert "No such file" in refused(tmp_path / "bad.bin")
    assert "directory" in refused(tmp_path).lower()


class Payload:
    """Unpickled, it makes a folder; `trap` says where."""

    def __init__(self, trap):
        self.trap = str(trap)

    def __reduce__(self):
        return os.mkdir, (self.trap,)


HOSTILE = {
    "bare pickle": lambda trap, weights: pickle.dumps(Payload(trap), protocol=2),
    "among tensors": lambda trap, weights: {**weights, "image_proj.norm.bias": Payload(trap)},
    "as a section": lambda trap, weights: {"image_proj": Payload(trap), "ip_adapter": weights},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_code_in_a_pickle_never_runs(kind, zipped, tmp_path):
    path, trap = tmp_path / "bad.bin", tmp_path / "ran"
    content = HOSTILE[kind](trap, random_weights(LINEAR))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert not trap.exists()
    message, shown = str(error.value), "".join(traceback.format_exception(error.value))
    assert NAMED in message
    assert f"an object of {os.mkdir.__module__}.mkdir besides" in message
    assert "set to `False`" not in shown  # torch's own text explains how to run it
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists(), "the payload does nothing, so this test shows nothing"


@pytest.mark.parametrize(
    "content, said",
    [
        ({}, "no 'image_proj.…' tensors. Found 0 tensors"),
        ([torch.randn(2)], "holds list at 'top level', where a tensor was expected"),
        ({"image_proj": {"proj": 3}}, "holds int at 'image_proj.proj', where a tensor"),
        ({"image_proj": None}, "holds NoneType at 'image_proj'"),
        ({"a": {"b": {"c": torch.randn(2)}}}, "holds dict at 'a.b'"),
        ({"unet.conv.weight": torch.randn(2)}, "Found 1 tensors: unet.conv.weight"),
        ({"image_proj.proj.weight": torch.randn(2)}, "no 'ip_adapter.N.to_k_ip.weight'"),
        (torch.nn.Linear(2, 2), "an object of torch.nn.modules.linear.Linear"),
    ],
)
def test_other_contents(content, said, tmp_path):
    torch.save(content, tmp_path / "bad.bin")
    message = refused(tmp_path / "bad.bin")
    assert NAMED in message
    assert said in message


def without(*keys):
    return lambda w: [w.pop(key) for key in keys]


def put(key, value):
    return lambda w: w.__setitem__(key, value)


def change(key, function):
    return lambda w: w.__setitem__(key, function(w[key]))


def poke(number):
    return change(K3, lambda w: w.index_fill(1, torch.tensor([5]), number))


@pytest.mark.parametrize(
    "layout, damage, said",
    [
        (LINEAR, without("image_proj.norm.bias"), ["1 of 10", "image_proj.norm.bias"]),
        (LINEAR, without("image_proj.norm.weight"), ["incomplete base", "norm.weight"]),
        (RESAMPLER, without("image_proj.layers.2.0.to_q.weight"), ["1 of 57", "layers.2.0.to_q"]),
        (RESAMPLER, without("image_proj.latents"), ["unknown kind", "image_proj.latents"]),
        (MLP, without("image_proj.proj.0.bias"), ["1 of 12", "image_proj.proj.0.bias"]),
        (LINEAR, without("ip_adapter.3.to_v_ip.weight"), ["1 of 10", "ip_adapter.3.to_v_ip"]),
        (LINEAR, without(K3, "ip_adapter.3.to_v_ip.weight"), ["layers 1, 5;", "3 is missing"]),
        (LINEAR, put("ip_adapter.2.to_k_ip.weight", torch.randn(8, 16)), ["1, 2, 3, 5", "(odd)"]),
        (LINEAR, put("ip_adapter.9999999.to_k_ip.weight", torch.randn(1)), ["1 tensors that no"]),
        (RESAMPLER, put("image_proj.layers.999.x", torch.randn(1)), ["11 of 68", "missing"]),
        (LINEAR, put("optimizer.step", torch.randn(1)), ["1 tensors that no", "optimizer.step"]),
        (LINEAR, change(K3, lambda w: w[:, :9]), [K3, "[16, 9]", "expected [16, 16]"]),
        (LINEAR, change("image_proj.proj.weight", lambda w: w[:63]), ["[63, 24]", "[48, 24]"]),
        (LINEAR, change("image_proj.proj.weight", lambda w: w[0]), ["base", "wrong shape"]),
        (LINEAR, change("image_proj.norm.weight", lambda w: w[:0]), ["base", "wrong shape"]),
        (RESAMPLER, change("image_proj.latents", lambda w: w[0]), ["[16, 64]", "[1, 64, 64]"]),
        (
            RESAMPLER,
            change("image_proj.layers.0.0.to_q.weight", lambda w: w[:32]),
            ["'heads': 0", "64"],
        ),
        (LINEAR, poke(math.nan), [K3, "NaN or infinite"]),
        (LINEAR, poke(-math.inf), [K3, "NaN or infinite"]),
        (LINEAR, change(K3, lambda w: w.to(torch.int8)), [K3, "torch.int8", "expected float32"]),
        (LINEAR, change(K3, lambda w: w.double()), [K3, "torch.float64", "expected float32"]),
        (LINEAR, change(K3, lambda w: w.to(torch.float8_e4m3fn)), [K3, "float8_e4m3fn"]),
    ],
)
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_damaged_adapters(write, layout, damage, said, tmp_path):
    weights = random_weights(layout)
    damage(weights)
    write({key: value.contiguous() for key, value in weights.items()}, tmp_path / "bad.bin")
    message = refused(tmp_path / "bad.bin")
    assert all(words in message for words in [NAMED, *said]), message


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(16).to_sparse(), torch.empty(16, 16, device="meta"), torch.ones(1).expand(16, 16)],
    ids=["sparse", "meta", "expanded"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_plain(tensor, tmp_path):
    torch.save({**random_weights(LINEAR), K3: tensor}, tmp_path / "bad.bin")
    message = refused(tmp_path / "bad.bin")
    assert NAMED in message
    assert f"'{K3}', where a plain one was expected" in message


def face_projection(width, context, tokens=4):
    """Two linear layers and a normalisation over a vector."""
    layers = dense("proj.0", 2 * width, width) | dense("proj.2", tokens * context, 2 * width)
    return layers | norm("norm", context)


def consecutive(width, context):
    """K'/V' of a transformer: its blocks are numbered 0, 1, 2, … without self-attention."""
    return {
        f"ip_adapter.{n}.to_{kind}_ip.weight": (width, context) for n in range(3) for kind in "kv"
    }


WIDTHS = (8, 8)
KINDS = {
    "FaceID Plus": [
        ip_adapter(
            face_projection(512, 16) | under("perceiver_resampler.", dense("proj_in", 4096, 16)),
            WIDTHS,
            16,
        )
    ],
    "InstantID": [ip_adapter(resampler(512, 16, 64), WIDTHS, 16)],
    "SD3": [
        under("image_proj.", resampler(24, 16, 64))
        | consecutive(2432, 16)
        | dense("image_proj.time_embedding.linear_1", 8, 8)
        | dense("ip_adapter.0.norm_ip.linear", 8, 8),
        under("image_proj.", resampler(24, 16, 64)) | consecutive(1536, 16),
    ],
}


@pytest.mark.parametrize(
    "kind, layout", [(kind, layout) for kind, layouts in KINDS.items() for layout in layouts]
)
def test_refused_by_name(kind, layout, tmp_path):
    torch.save(random_weights(layout), tmp_path / "theirs.bin")
    message = refused(tmp_path / "theirs.bin")
    assert re.match(rf"'theirs.bin' is an? {re.escape(kind)} (IP-A|a)dapter", message), message
    assert "Supported are the base, fine-grained (plus) and full" in message
