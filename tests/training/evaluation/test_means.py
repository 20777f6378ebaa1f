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


def test_means_are_those_of_single_pictures(settings, folder):
    """All of it again, one picture at a time."""
    results = evaluate(settings)
    base = load_base(settings.pretrained_model_name_or_path)
    attach(base.unet)
    encoder = ImageEncoder.from_name(settings.image_encoder_path)
    clip = load_clip(settings.clip_model, torch.device("cpu"))
    sampler = Sampler(base, settings.sampling)
    annotations = json.loads((folder / "coco/annotations/captions_val2017.json").read_text())
    adapters = small.adapter("sd15", "base"), small.adapter("sd15", "plus", seed=9)
    for adapter, found in zip(adapters, results["adapters"], strict=True):
        for entry, text in ((found["image_only"], False), (found["with_text"][0], True)):
            like, true = [], []
            for row, image in enumerate(annotations["images"]):
                picture = Image.open(folder / "coco/val2017" / image["file_name"])
                caption = f"the first caption of picture {row}"
                features, zero = encode_images(encoder, [picture], adapter.spec.features)
                for sample in range(SAMPLES):
                    asked = Prompts(
                        encode_text(base, [caption if text else ""]),
                        features,
                        zero,
                        [0.5 if text else 1.0],
                        [row * SAMPLES + sample],
                    )
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


def test_what_is_written(settings):
    results = evaluate(settings)
    out = Path(settings.output_dir)
    assert json.loads((out / "results.json").read_text()) == results
    assert len((out / "scores-00000.jsonl").read_text().splitlines()) == 2 * 3 * PICTURES * SAMPLES
    table = (out / "table.md").read_text()
    here, published = table.split("Published, not measured here")
    assert "| one.safetensors |" in here and "| two.bin |" in here and "0.588" not in here
    assert "| IP-Adapter | 22M | image only | 0.588 | 0.828 |" in published
    assert "arXiv 2308.06721, Table 1" in published
    assert here.count("| with text | 0.5 |") == 2 and here.count("| image only | 1 |") == 2
    shown = results["adapters"][0]["with_text"][0]
    assert f"{shown['clip_t']:.3f}" in here and f"{shown['clip_i']:.3f}" in here
    assert Image.open(out / "weights.png").size[0] > 500


def test_the_plot_shows_the_measured_points(settings, monkeypatch):
    drawn = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(
        Axes,
        "errorbar",
        lambda self, x, y, *a, **k: drawn.append((x, y)) or errorbar(self, x, y, *a, **k),
    )
    results = evaluate(settings)
    expected = [
        ([e["weight"] for e in adapter["with_text"]], [e[name] for e in adapter["with_text"]])
        for name in ("clip_i", "clip_t")
        for adapter in results["adapters"]
    ]
    assert drawn == expected


def test_a_limit_takes_the_first_pictures_only(settings):
    evaluate(settings)
    few = evaluate(changed(settings, max_samples=2))
    assert few["pictures"] == 2
    assert few["adapters"][0]["image_only"]["samples"] == 2 * SAMPLES


def test_the_batch_changes_nothing_but_last_bits(settings, tmp_path):
    large = evaluate(settings)
    one = evaluate(changed(settings, batch_size=1, output_dir=str(tmp_path / "other")))
    for a, b in zip(large["adapters"], one["adapters"], strict=True):
        assert a["image_only"]["clip_i"] == pytest.approx(b["image_only"]["clip_i"], abs=2e-3)


def test_image_only(settings, drawn):
    results = evaluate(changed(settings, scale=()))
    assert sum(drawn) == 2 * PICTURES * SAMPLES
    assert results["adapters"][0]["with_text"] == []
    assert Path(settings.output_dir, "weights.png").exists()


def test_broken_pictures_are_left_out_and_named(settings, tmp_path, drawn):
    image_folders.coco(tmp_path / "coco", PICTURES)
    (tmp_path / "coco/val2017/000000000001.png").write_bytes(b"\x89PNG")
    given = changed(settings, eval_data_dir=str(tmp_path / "coco"), scale=())
    results = evaluate(given)
    assert list(results["broken"]) == ["000000000001.png"] and results["pictures"] == PICTURES - 1
    assert results["adapters"][0]["image_only"]["samples"] == (PICTURES - 1) * SAMPLES
    assert "000000000001.png" in Path(settings.output_dir, "table.md").read_text()
    drawn.clear()
    assert evaluate(given) == results and not drawn
    expected = evaluate(changed(settings, scale=(), output_dir=str(tmp_path / "whole")))
    found = scores.read(Path(settings.output_dir)).scores
    for key, score in scores.read(tmp_path / "whole").scores.items():
        if key.row != 1:  # seeds belong to rows, so the others have not changed
            assert found[key].clip_i == pytest.approx(score.clip_i, abs=2e-3)
    assert expected["pictures"] == PICTURES


def test_a_plain_folder_with_captions(settings, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    rows = []
    for number in range(2):
        image_folders.image(number).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"caption {number}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = evaluate(changed(settings, eval_data_dir=str(folder)))
    assert results["pictures"] == 2


def test_sdxl(settings, tmp_path):
    small.base(tmp_path / "base", "sdxl", levels=2)
    save_file(small.adapter("sdxl", "base").state_dict(), tmp_path / "xl.safetensors")
    chosen = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "ip_adapter_path": [str(tmp_path / "xl.safetensors")],
    }
    results = evaluate(changed(settings, max_samples=1, **chosen))
    assert results["adapters"][0]["with_text"][0]["samples"] == SAMPLES


def test_published_numbers_are_those_of_the_design():
    by_name = {name: (text, image) for name, _, text, image in report.PUBLISHED}
    assert by_name["IP-Adapter"] == (0.588, 0.828)
    assert by_name["Open unCLIP"] == (0.608, 0.858)
    assert len(report.PUBLISHED) == 7
