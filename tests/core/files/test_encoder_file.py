"""Image towers of open_clip: which configuration counts, and what is said of files without one."""

from __future__ import annotations

import json
import logging
from unittest.mock import MagicMock

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.files import encoder_file as image_tower
from comfyui_ip_adapter.ip_adapter_core.files.tower_config import ImageEncoderError, describe
from safetensors.torch import save_file

from tests.support import small_models
from tests.support import sparse_files as sparse


class Shaped:
    """A tensor of that shape, as the header tells of it."""

    def __init__(self, shape):
        self.shape, self.ndim = shape, len(shape)


def tower(name):
    return {key: Shaped(shape) for key, shape in sparse.tower(name).items()}


def described(path, name):
    return describe(path, tower(name), {})


def config(name, **changes):
    return json.dumps({"model_cfg": sparse.config(name) | changes})


@pytest.mark.parametrize("notes", ["{}", "[]", '{"model": {"name": "ViT-H"}, "tags": []}', "null"])
@pytest.mark.parametrize("name", ["h.json", "open_clip_config.json"])
def test_notes_of_other_programs_are_no_configuration(tmp_path, notes, name):
    (tmp_path / name).write_text(notes)
    found = described(tmp_path / "h.safetensors", "ViT-H-14")
    assert (found.vision["head_width"], found.embed_dim) == (80, 1024)


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-H-14-CLIPA", "RN50", "convnext_base_w"]
)
def test_the_configuration_of_a_folder_counts_for_its_own_tower_only(tmp_path, name):
    (tmp_path / "open_clip_config.json").write_text(config(name))
    path = tmp_path / "any.safetensors"
    assert described(path, "ViT-H-14").vision["head_width"] == 80
    if "CLIPA" not in name:  # which has no layout of its own here
        assert described(path, name).vision == sparse.config(name)["vision_cfg"]
    with pytest.raises(ImageEncoderError, match=r"open_clip_config\.json' beside it is of another"):
        described(path, "ViT-B-16" if name != "convnext_base_w" else "RN50")
    (tmp_path / "any.json").write_text(config("ViT-B-16"))
    assert described(path, "ViT-B-16").vision == sparse.config("ViT-B-16")["vision_cfg"]


def test_a_damaged_configuration_of_a_folder_stops_no_other_tower(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{")
    assert described(tmp_path / "a.safetensors", "ViT-H-14").embed_dim == 1024
    with pytest.raises(ImageEncoderError, match=r"brings no configuration \('open_clip_config"):
        described(tmp_path / "a.safetensors", "ViT-L-14")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_configuration_in_the_encodings_of_editors(tmp_path, encoding):
    (tmp_path / "a.json").write_text(config("ViT-L-14"), encoding=encoding)
    assert described(tmp_path / "a.safetensors", "ViT-L-14").embed_dim == 768


@pytest.mark.parametrize(
    "text, said",
    [
        (b"\xff\xfe\xff\xd8{", "UnicodeDecodeError|JSONDecodeError"),
        (b'{"vision_cfg": {}}', "embed_dim"),
        (b'{"embed_dim": 4, "vision_cfg": {"width": "1280"}}', "'width' is '1280'"),
        (b'{"embed_dim": 4, "vision_cfg": {"image_size": [8, null]}}', r"'image_size' is \[8"),
        (b'{"embed_dim": 4, "vision_cfg": {"head_width": 0}}', "'head_width' is 0"),
        (b'{"embed_dim": 4, "vision_cfg": {"mlp_ratio": null}}', "'mlp_ratio' is None"),
        (
            b'{"model_cfg": {"embed_dim": 4, "vision_cfg": {}}, "preprocess_cfg": {"std": [1]}}',
            r"'std' is \[1\]",
        ),
        (b'{"model_cfg": {"embed_dim": 4, "vision_cfg": {}}, "preprocess_cfg": 7}', "int"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, text, said):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ImageEncoderError, match=f"'a.json' beside it is no conf.*(?:{said})"):
        described(tmp_path / "a.safetensors", "ViT-L-14")


def test_null_stands_for_the_default(tmp_path):
    given = json.loads(config("ViT-L-14")) | {"preprocess_cfg": {"mean": None, "std": [1, 1, 1]}}
    (tmp_path / "a.json").write_text(json.dumps(given))
    assert described(tmp_path / "a.safetensors", "ViT-L-14").preprocess == {"std": [1, 1, 1]}


@pytest.mark.parametrize("key", ["positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"])
def test_a_tower_without_what_tells_its_sizes(tmp_path, key):
    state = {k: x for k, x in tower("ViT-H-14").items() if k != key}
    with pytest.raises(ImageEncoderError, match=f"lacks 1 tensors.*{key}"):
        describe(tmp_path / "a.safetensors", state, {})


def told(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "name, variant", [("ViT-H-14", "ViT-H-14-quickgelu"), ("ViT-bigG-14", "ViT-bigG-14-quickgelu")]
)
def test_shapes_alone_leave_the_activation_open(tmp_path, caplog, name, variant):
    layout = {k: x for k, x in sparse.tower(name).items() if ".resblocks." not in k or ".0." in k}
    path = sparse.write(tmp_path / "any.safetensors", layout)
    image_tower.read(path)
    (said,) = told(caplog)
    assert variant in said and "'any.safetensors'" in said
    caplog.clear()
    given = sparse.config(name)
    path.with_suffix(".json").write_text(
        config(name, vision_cfg=given["vision_cfg"] | {"layers": 1})
    )
    image_tower.read(path)
    assert not told(caplog)


@pytest.mark.parametrize("where", ["metadata", "small.json", "open_clip_config.json"])
def test_the_configuration_that_counts_goes_to_the_log(tmp_path, caplog, where):
    caplog.set_level(logging.INFO)
    text = json.dumps(small_models.open_clip_config())
    metadata = {"open_clip_config": text} if where == "metadata" else None
    state = small_models.open_clip_model().visual.state_dict()
    path = tmp_path / "small.safetensors"
    save_file({key: x.contiguous() for key, x in state.items()}, path, metadata)
    if where != "metadata":
        (tmp_path / where).write_text(text)
    image_tower.read(path)
    assert any("'small.safetensors'" in said and where in said for said in told(caplog))


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_in_both_formats(tmp_path, legacy):
    state = small_models.open_clip_model().state_dict()
    path = tmp_path / "small.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    path.with_suffix(".json").write_text(json.dumps(small_models.open_clip_config()))
    _, found = image_tower.read(path)
    assert found and all(torch.equal(x, state[f"visual.{key}"]) for key, x in found.items())


@pytest.mark.parametrize("error", [ValueError, AttributeError, IndexError, NotImplementedError])
def test_whatever_torch_raises_of_a_damaged_file(tmp_path, monkeypatch, error):
    (tmp_path / "a.pt").write_bytes(b"PK\3\4")

    def damaged(*_, **__):
        raise error("odd bytes\nand more")

    monkeypatch.setattr(torch, "load", damaged)
    with pytest.raises(ImageEncoderError, match=r"cannot be read.*: odd bytes\)"):
        image_tower.read(tmp_path / "a.pt")


def test_memory_that_ran_out_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"PK\3\4")

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        image_tower.read(tmp_path / "a.pt")


def test_tensors_for_the_hosts_loader_are_not_read_twice(tmp_path, monkeypatch):
    opened = MagicMock()
    file = opened.return_value.__enter__.return_value
    file.keys.return_value = list(sparse.vision())
    monkeypatch.setattr(image_tower, "safe_open", opened)
    path = sparse.write(tmp_path / "h.safetensors", sparse.vision())
    assert image_tower.read(path) == (None, {})
    file.get_tensor.assert_not_called()
