"""Means, table and plot of an evaluation; which pictures they are of."""

from __future__ import annotations

import json
from dataclasses import replace as changed
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from safetensors.torch import save_file

from tests.support import image_folders
from tests.support import small_models as small
from training.evaluate import evaluate
from training.evaluation import report, scores
from training.evaluation.clip_score import clip_i, clip_t, load_clip
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder
from training.sampling import Prompts, Sampler, encode_images, encode_text
from training.unet import attach

PICTURES, SAMPLES = 5, 2  # conftest.py's


@pytest.fixture
def results(measured):
    return json.loads(Path(measured.output_dir, "results.json").read_bytes())


def test_means_are_those_of_single_pictures(measured, results, folder):
    """All of it again, one picture at a time."""
    base = load_base(measured.pretrained_model_name_or_path)
    attach(base.unet)
    encoder = ImageEncoder.from_name(measured.image_encoder_path)
    clip = load_clip(measured.clip_model, torch.device("cpu"))
    sampler = Sampler(base, measured.sampling)
    annotations = json.loads((folder / "coco/annotations/captions_val2017.json").read_text())
    adapters = small.adapter("sd15", "base"), small.adapter("sd15", "plus", seed=9)
    for adapter, found in zip(adapters, results["adapters"], strict=True):
        for entry, text in ((found["image_only"], False), (found["with_text"][0], True)):
            like, true = [], []
            for row, image in enumerate(annotations["images"]):
                picture = Image.open(folder / "coco/val2017" / image["file_name"])
                caption = f"the first caption of picture {row}"
                features, zero = encode_images(encoder, [picture], adapter.spec.features)
                states = encode_text(base, [caption if text else ""])
                weight = 0.5 if text else 1.0
                for sample in range(SAMPLES):
                    asked = Prompts(states, features, zero, [weight], [row * SAMPLES + sample])
                    embed = clip.images(sampler.draw(adapter, asked))
                    like.append(float(clip_i(embed, clip.images([picture]))))
                    true.append(float(clip_t(embed, clip.texts([caption]))))
            assert entry["samples"] == PICTURES * SAMPLES
            assert entry["clip_i"] == pytest.approx(sum(like) / len(like), abs=2e-3)
            assert entry["clip_t"] == pytest.approx(sum(true) / len(true), abs=2e-3)
            per_picture = torch.tensor(like).view(PICTURES, SAMPLES).mean(1)
            error = float(per_picture.std() / PICTURES**0.5)
            assert entry["clip_i_error"] == pytest.approx(error, abs=2e-3)
    one, two = results["adapters"]
    assert one["image_only"]["clip_i"] != two["image_only"]["clip_i"], "shows nothing"
    assert one["with_text"][0]["clip_i"] != one["with_text"][1]["clip_i"], "shows nothing"


def test_what_is_written(done, monkeypatch):
    points, errorbar = [], Axes.errorbar

    def noting(self, x, y, *args, **options):
        points.append((x, y))
        return errorbar(self, x, y, *args, **options)

    monkeypatch.setattr(Axes, "errorbar", noting)
    results = evaluate(done)
    out = Path(done.output_dir)
    assert json.loads((out / "results.json").read_text()) == results
    assert len((out / "scores-00000.jsonl").read_text().splitlines()) == 2 * 3 * PICTURES * SAMPLES
    here, published = (out / "table.md").read_text().split("Published, not measured here")
    assert "| one.safetensors |" in here and "| two.bin |" in here and "0.588" not in here
    assert "| IP-Adapter | 22M | image only | 0.588 | 0.828 |" in published
    assert "| Open unCLIP | 893M | image only | 0.608 | 0.858 |" in published
    assert len(report.PUBLISHED) == 7
    assert "arXiv 2308.06721, Table 1" in published
    assert here.count("| with text | 0.5 |") == 2 and here.count("| image only | 1 |") == 2
    shown = results["adapters"][0]["with_text"][0]
    assert f"{shown['clip_t']:.3f}" in here and f"{shown['clip_i']:.3f}" in here
    assert Image.open(out / "weights.png").size[0] > 500
    assert points == [
        ([e["weight"] for e in adapter["with_text"]], [e[name] for e in adapter["with_text"]])
        for name in ("clip_i", "clip_t")
        for adapter in results["adapters"]
    ]


def test_a_limit_takes_the_first_pictures_only(done):
    few = evaluate(changed(done, max_samples=2))
    assert few["pictures"] == 2
    assert few["adapters"][0]["image_only"]["samples"] == 2 * SAMPLES


def test_without_text_and_in_smaller_batches(settings, results, drawn):
    alone = evaluate(changed(settings, scale=(), batch_size=1))
    assert sum(drawn) == 2 * PICTURES * SAMPLES
    assert alone["adapters"][0]["with_text"] == []
    assert Path(settings.output_dir, "weights.png").exists()
    for a, b in zip(results["adapters"], alone["adapters"], strict=True):
        assert a["image_only"]["clip_i"] == pytest.approx(b["image_only"]["clip_i"], abs=2e-3)


def test_broken_pictures_are_left_out_and_named(settings, measured, tmp_path, drawn):
    image_folders.coco(tmp_path / "coco", PICTURES)
    (tmp_path / "coco/val2017/000000000001.png").write_bytes(b"\x89PNG")
    given = changed(settings, eval_data_dir=str(tmp_path / "coco"), scale=())
    results = evaluate(given)
    assert list(results["broken"]) == ["000000000001.png"] and results["pictures"] == PICTURES - 1
    assert results["adapters"][0]["image_only"]["samples"] == (PICTURES - 1) * SAMPLES
    assert "000000000001.png" in Path(settings.output_dir, "table.md").read_text()
    drawn.clear()
    assert evaluate(given) == results and not drawn
    whole = scores.read(Path(measured.output_dir)).scores
    for key, score in scores.read(Path(settings.output_dir)).scores.items():
        # seeds belong to rows, so the others have not changed
        assert key.row != 1 and whole[key].clip_i == pytest.approx(score.clip_i, abs=2e-3)


def test_a_plain_folder_with_captions(settings, tmp_path):
    image_folders.with_metadata(tmp_path / "plain", 2)
    assert evaluate(changed(settings, eval_data_dir=str(tmp_path / "plain")))["pictures"] == 2


def test_sdxl(settings, tmp_path):
    small.base(tmp_path / "base", "sdxl", levels=2)
    save_file(small.adapter("sdxl", "base").state_dict(), tmp_path / "xl.safetensors")
    chosen = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "ip_adapter_path": [str(tmp_path / "xl.safetensors")],
    }
    results = evaluate(changed(settings, max_samples=1, **chosen))
    assert results["adapters"][0]["with_text"][0]["samples"] == SAMPLES
