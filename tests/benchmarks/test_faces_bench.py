"""Encoding a face beside insightface: the same work on both sides."""

from __future__ import annotations

import pytest
import torch

from benchmarks import faces
from benchmarks.__main__ import LIMITS
from tests.support.faces import write_pack

pytest.importorskip("onnx", reason="`pip install onnx onnxruntime`")


def test_both_embed_the_same_face(tmp_path):
    pytest.importorskip("insightface", reason="`pip install insightface`")
    pack = write_pack(tmp_path / "buffalo_l", confident=faces.CONFIDENT)
    image = faces.picture()
    ours, theirs = faces.this_pack(pack)(image), faces.insightface(pack)(image)
    assert torch.cosine_similarity(ours, theirs).item() > 0.99
    assert faces.measure(3).keys() <= LIMITS.keys()


def test_without_insightface_nothing_is_claimed(monkeypatch, capsys):
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    assert faces.measure(3) == {}
    assert "insightface is not installed" in capsys.readouterr().err
