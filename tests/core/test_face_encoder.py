"""Faces by onnxruntime alone: as insightface finds, cuts out and describes them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

pytest.importorskip("onnx", reason="`pip install onnx onnxruntime`")
pytest.importorskip("onnxruntime", reason="`pip install onnxruntime`")

from ip_adapter_core import face_encoder
from ip_adapter_core.face_encoder import (
    FaceEncoder,
    FaceEncoderError,
    aligned,
    marked,
    similarity,
)
from tests.support import faces


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return faces.write_pack(tmp_path_factory.mktemp("models") / "buffalo_l")


@pytest.fixture(scope="module")
def encoder(pack):
    return FaceEncoder(pack)


def picture(height, width, seed=0):
    """A picture of 8 bits with large and small details."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)
    fine = torch.rand(1, 3, max(1, height // 8), max(1, width // 8), generator=generator)
    both = [interpolate(x, (height, width), mode="bicubic") for x in (coarse, fine)]
    return ((0.7 * both[0] + 0.3 * both[1]).clamp(0, 1)[0].movedim(0, -1) * 255).round() / 255


def bgr(image):
    return (image * 255).round().byte().numpy()[..., ::-1].copy()


@pytest.mark.parametrize(
    "size", [(640, 640), (480, 640), (300, 60), (60, 300), (1200, 900), (640, 2000)]
)
def test_what_insightface_finds(pack, encoder, size):
    scrfd = pytest.importorskip("insightface.model_zoo.scrfd", reason="`pip install insightface`")
    theirs = scrfd.SCRFD(model_file=str(pack / "det_10g.onnx"))
    theirs.prepare(0, input_size=(640, 640), det_thresh=0.5)
    image = picture(*size)
    boxes, points = theirs.detect(bgr(image), input_size=(640, 640))
    ours = encoder.faces(image)
    assert len(boxes) > 3 and abs(len(ours) - len(boxes)) <= len(boxes) // 20
    near = 0
    for face in ours:  # a few lie at the threshold, or beside one that is as sure
        distance = np.abs(boxes[:, :4] - face.box.numpy()).max(1)
        nearest = distance.argmin()
        reach = 0.5 * max(1.0, max(size) / 640) + 0.1
        same = distance[nearest] < reach and abs(boxes[nearest, 4] - face.score) < 0.02
        near += same and np.abs(points[nearest] - face.points.numpy()).max() < reach
    assert near >= 0.9 * len(ours)


ANGLES = [0.0, 0.4, 1.5, 3.0]


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("side", [112, 224, 256])
def test_the_crop_is_insightfaces(angle, side):
    face_align = pytest.importorskip("insightface.utils.face_align")
    image = picture(200, 260, seed=3)
    turn = torch.tensor(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float64
    )
    shape = torch.tensor([[-20.0, -15], [20, -16], [1, 4], [-14, 22], [15, 21]]).double()
    for center in ([130.0, 100.0], [10.0, 190.0]):  # inside, and at the edge
        points = (shape @ turn.T + torch.tensor(center).double()).float()
        wanted = face_align.norm_crop(bgr(image), points.numpy(), image_size=side)
        found = bgr(aligned(image, points, side))
        difference = np.abs(wanted.astype(int) - found.astype(int))
        assert difference.mean() < 1.0 and np.percentile(difference, 99) <= 4


def test_the_similarity_is_the_best_one():
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    exact = torch.tensor([[0.6, -0.8, 3.0], [0.8, 0.6, -1.0]], dtype=torch.float64)
    onto = points @ (2 * exact[:, :2]).T + exact[:, 2]
    torch.testing.assert_close(similarity(points, onto)[:, :2], 2 * exact[:, :2])
    mirrored = points * torch.tensor([-1.0, 1.0])
    made = similarity(points, mirrored)[:, :2]
    assert torch.linalg.det(made) > 0, "faces are turned, never mirrored"
    with pytest.raises(FaceEncoderError, match="lie in one place"):
        similarity(torch.ones(5, 2).double(), points)


def test_embeddings_are_insightfaces(pack, encoder):
    arcface = pytest.importorskip("insightface.model_zoo.arcface_onnx")
    theirs = arcface.ArcFaceONNX(model_file=str(pack / "w600k_r50.onnx"))
    theirs.prepare(0)
    crops = torch.stack([picture(112, 112, seed) for seed in range(3)])
    wanted = torch.from_numpy(np.concatenate([theirs.get_feat(bgr(one)) for one in crops]))
    found = encoder.embed(crops)
    assert torch.cosine_similarity(found, wanted).min() > 0.9999
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_no_face_says_what_was_tried(tmp_path):
    encoder = FaceEncoder(faces.write_pack(tmp_path / "shy", confident=-20.0))
    said = (
        r"No face was found in a picture of 90×70 pixels, sought at 640 down to 320 pixels.*0\.0.*"
        "Take a picture in which the face is larger"
    )
    with pytest.raises(FaceEncoderError, match=said):
        encoder.faces(picture(70, 90))


def test_smaller_sizes_are_tried(tmp_path, monkeypatch):
    encoder = FaceEncoder(faces.write_pack(tmp_path / "shy"))
    sides, detect = [], encoder._detect

    def later(image, side):
        sides.append(side)
        return detect(image, side) if side <= 512 else ([], 0.1)

    monkeypatch.setattr(encoder, "_detect", later)
    assert encoder.faces(picture(300, 300)) and sides == [640, 576, 512]


def test_one_of_several_processes_keeps_to_one_thread(pack, encoder):
    image = picture(120, 100)
    single = FaceEncoder(pack, single=True)
    for session in (single._detector, single._recognizer):
        assert session.get_session_options().intra_op_num_threads == 1
        assert session.get_providers() == ["CPUExecutionProvider"]
    one, other = (
        x.embed(aligned(image, x.faces(image)[0].points)[None]) for x in (single, encoder)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_missing_or_damaged(tmp_path, pack, monkeypatch):
    with pytest.raises(FaceEncoderError, match=r"lacks det_10g\.onnx or .*w600k_r50\.onnx.*Put"):
        FaceEncoder(tmp_path)
    cut = tmp_path / "cut"
    cut.mkdir()
    for name in ("det_10g.onnx", "w600k_r50.onnx"):
        data = (pack / name).read_bytes()
        (cut / name).write_bytes(data[: len(data) // 2] if name[0] == "w" else data)
    with pytest.raises(FaceEncoderError, match=r"w600k_r50\.onnx' cannot be read.* put insight"):
        FaceEncoder(cut)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FaceEncoderError, match="pip install onnxruntime"):
        FaceEncoder(pack)


def test_embeddings_that_are_not_finite(pack, encoder, monkeypatch):
    class Broken:
        def get_inputs(self):
            return encoder._recognizer.get_inputs()

        def run(self, *_):
            return [np.full((1, 512), np.nan, np.float32)]

    other = FaceEncoder(pack)
    monkeypatch.setattr(other, "_recognizer", Broken())
    with pytest.raises(FaceEncoderError, match=r"gives NaN or infinite embeddings.*Put insight"):
        other.embed(torch.zeros(1, 112, 112, 3))


def test_the_preview_shows_the_points():
    image = torch.zeros(100, 120, 3)
    points = torch.tensor([[50.0, 40], [70, 40], [60, 50], [52, 62], [68, 62]])
    face = face_encoder.Face(torch.tensor([40.0, 30, 80, 75]), points, 0.9)
    shown = marked(image, face, 128)
    assert shown.shape == (128, 128, 3)
    colors = {tuple(x) for x in shown.reshape(-1, 3).round().int().tolist()}
    assert {(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)} <= colors
    edge = face_encoder.Face(torch.tensor([-30.0, -30, 5, 5]), points - 60, 0.9)
    assert marked(image, edge, 64).isfinite().all()


def test_what_length_an_embedding_has_for_the_projection():
    from ip_adapter_core.face_projection import unit

    raw = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(unit(raw), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
