"""Training FaceID: of a column of embeddings, or of faces that are found in the pictures."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from ip_adapter_core.face_encoder import FaceEncoder, aligned
from ip_adapter_core.files import adapter_file
from tests.support import faces, image_folders
from tests.support.sets import nightly
from training import cache
from training.caching.dataset import CachedDataset
from training.errors import TrainingError
from training.evaluation import adapters
from training.models.face_embedder import EmbedFace
from training.trainer import Trainer
from training.unet import attention_inputs

pytestmark = pytest.mark.usefixtures("arrow")
COUNT = 12


@pytest.fixture(scope="session")
def people(tmp_path_factory) -> Path:
    """Pictures with an embedding each, in a column `id`."""
    folder = tmp_path_factory.mktemp("people")
    generator = np.random.default_rng(0)
    lines = []
    for n in range(COUNT):
        image_folders.image(n, (80, 70)).save(folder / f"{n}.png")
        np.save(folder / f"{n}.npy", 20 * generator.normal(size=512).astype(np.float32))
        lines.append(f'{{"file_name": "{n}.png", "text": "person {n}", "id": "{n}.npy"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def pack(tmp_path_factory) -> Path:
    """A model pack that finds a face in each of these, and none in a grey picture."""
    pytest.importorskip("onnx", reason="`pip install onnx onnxruntime`")
    pytest.importorskip("onnxruntime", reason="`pip install onnxruntime`")
    return faces.write_pack(tmp_path_factory.mktemp("models") / "buffalo_l", confident=-2.0)


@pytest.fixture
def given(settings, people):
    """The config of a small run of FaceID, with changes."""

    def given(**changes):
        face = {"variant": "faceid", "image_encoder_path": None, "face_embedding_column": "id"}
        return settings(**{**face, "train_data_dir": str(people), **changes})

    return given


@pytest.fixture
def found(given, pack):
    """The same, with faces that are found."""
    return lambda **changes: given(
        **{"face_embedding_column": None, "face_encoder": str(pack), **changes}
    )


@pytest.fixture
def cached(tmp_path, accelerate_anew):
    """The same config, from a cache made for it."""

    def cached(config, name="cache", **changes):
        accelerate_anew()
        made = cache.CacheConfig(
            pretrained_model_name_or_path=config.pretrained_model_name_or_path,
            face_encoder=config.face_encoder,
            face_embedding_column=config.face_embedding_column,
            train_data_dir=config.train_data_dir,
            output_dir=str(tmp_path / name),
            resolution=64,
            features="face_embeds",
            cache_dtype="float32",
            rows_per_shard=5,
            dataloader_num_workers=0,
        )
        cache.make(replace(made, **changes))
        folder, out = str(tmp_path / name), str(tmp_path / f"from-{name}")
        return replace(config, feature_cache_dir=folder, train_data_dir=None, output_dir=out)

    return cached


def weights(config, step=4):
    return load_file(Path(config.output_dir, f"checkpoints/step-{step:07}/model.safetensors"))


def newest(config):
    return Path(config.output_dir, "ip-adapter.safetensors")


def distance(found, expected):
    """Of all weights together: single ones that start at 0 are as large as their noise."""
    difference = sum((found[k] - v).square().sum() for k, v in expected.items()).sqrt()
    return float(difference / sum(v.square().sum() for v in expected.values()).sqrt())


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl")])
def test_the_file_is_faceids_and_nothing_else_has_changed(given, frozen, family):
    config = given(family=family, learning_rate=1e-2)
    trainer = Trainer(config)
    frozen_before = {k: v.clone() for k, v in trainer.unet.state_dict().items()}
    start = {k: v.clone() for k, v in trainer.sampled().state_dict().items()}
    assert all(not v.any() for k, v in start.items() if "lora.up" in k)  # begins as the base is
    trainer.train()
    assert all(torch.equal(frozen_before[k], v) for k, v in trainer.unet.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in trainer.unet.parameters())
    end = trainer.sampled().state_dict()
    assert all(not torch.equal(start[k], v) for k, v in end.items()), "all of it trains"

    adapter = adapter_file.load(newest(config)).float()
    layers = len(adapter.spec.layer_dims)
    assert (adapter.spec.variant, adapter.spec.tokens) == ("faceid", 4)
    assert len(adapter.lora) == 2 * layers * 4 * 2
    file = {k: v.float() for k, v in load_file(newest(config)).items()}
    assert {len(v) for k, v in file.items() if "lora.down" in k} == {128}

    # It predicts what diffusers does with it, the LoRA merged, and what the trained UNet did.
    theirs = UNet2DConditionModel.from_pretrained(frozen / family, subfolder="unet")
    sections = {"image_proj": {}, "ip_adapter": {}}
    for key, value in file.items():
        part, name = key.split(".", 1)
        sections[part][name] = value
    theirs._load_ip_adapter_weights([sections])
    known = theirs._load_ip_adapter_loras([sections])[0]
    assert len(known) == len(adapter.lora)
    faces.merge_lora(theirs, file)
    batch = trainer.encode(next(trainer.batches))
    noisy, _ = trainer.loss.add_noise(trainer.loss.sample_latents(batch), batch)
    added = (
        {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]} if "pooled" in batch else {}
    )
    call = noisy, batch["timestep"], batch["states"]
    features = batch["features"]
    with torch.no_grad():
        embeds = [normalize(features, dim=-1)[:, None]]
        expected = theirs(*call, added_cond_kwargs={**added, "image_embeds": embeds}).sample
        trainer.sampled().load_state_dict(file)
        trained = trainer.sampled()
        conditions = attention_inputs(trained(features), trained)
        ours = trainer.unet(
            *call, added_cond_kwargs=added, cross_attention_kwargs=conditions
        ).sample
        plain = trainer.unet(*call, added_cond_kwargs=added).sample
    effect = (expected - plain).norm()
    assert effect > 0.01 * plain.norm()
    assert (ours - expected).norm() < 1e-4 * effect


def test_a_dropped_face_is_a_zero_embedding(given):
    trainer = Trainer(given(i_drop_rate=1.0, t_drop_rate=0.0, ti_drop_rate=0.0))
    batch = trainer.encode(next(trainer.batches))
    features, _, _ = trainer.loss.drop_conditions(batch)
    assert batch["features"].shape == features.shape == (4, 512)
    assert batch["features"].any() and not features.any()


def test_it_learns_to_follow_the_embedding(given):
    """Two persons, black and white: after training, the other's embedding predicts worse."""
    trainer = Trainer(given(learning_rate=4e-3))
    batch = trainer.encode(next(trainer.batches))
    batch["drop_image"][:] = batch["drop_text"][:] = False
    batch["timestep"][:] = 900
    batch["log_variance"][:] = -30
    batch["mean"] = 6 * torch.tensor([-1.0, 1, -1, 1]).view(4, 1, 1, 1).expand_as(batch["mean"])
    batch["features"] = batch["features"][[0, 1, 0, 1]]
    batch["states"] = batch["states"][:1].expand_as(batch["states"])
    wrong = batch | {"features": batch["features"][[1, 0, 1, 0]]}

    def losses():
        with torch.no_grad():
            return [trainer.loss(trainer.adapter, given).item() for given in (batch, wrong)]

    before = losses()
    for _ in range(100):
        loss = trainer.loss(trainer.adapter, batch)
        trainer.accelerator.backward(loss)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    after = losses()
    assert after[0] < 0.5 * before[0]
    assert after[1] > 1.1 * after[0]


def test_going_on_gives_the_same_files(given, tmp_path, train):
    extras = {"use_ema": True, "ema_decay": 0.9, "gradient_accumulation_steps": 2}
    straight = given(max_train_steps=4, checkpointing_steps=2, **extras)
    train(straight)
    parts = replace(straight, output_dir=str(tmp_path / "parts"))
    train(replace(parts, max_train_steps=2))
    train(parts)
    for name in ("adapter.safetensors", "model.safetensors", "optimizer.bin"):
        a, b = (
            Path(x.output_dir, "checkpoints/step-0000004", name).read_bytes()
            for x in (straight, parts)
        )
        assert a == b, name
    averaged, last = load_file(newest(parts)), weights(parts)
    assert any(not torch.equal(averaged[k], last[k].half()) for k in last if "lora.up" in k)


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"mixed_precision": "bf16"}, 1e-2),
        *nightly(({"mixed_precision": "fp16"}, 1e-2)),
    ],
)
def test_ways_to_save_memory(given, tmp_path, train, changes, tolerance):
    plain = given()
    train(plain)
    saving = replace(plain, output_dir=str(tmp_path / "saving"), **changes)
    train(saving)
    assert all(x.dtype == torch.float32 for x in weights(saving).values())
    assert distance(weights(saving), weights(plain)) < tolerance


@pytest.mark.nightly
def test_two_processes_learn_what_one_does(given, train, tmp_path, two_ranks):
    alone = given()
    train(alone)
    both = replace(alone, train_batch_size=2, output_dir=str(tmp_path / "both"))
    two_ranks(lambda config: Trainer(config).train(), both)
    assert distance(weights(both), weights(alone)) < 1e-4


class TestFaces:
    @pytest.fixture
    def crowd(self, people, tmp_path):
        """Of these pictures, two show nobody, and one cannot be read."""
        folder = tmp_path / "crowd"
        shutil.copytree(people, folder)
        for n in (3, 7):
            Image.new("RGB", (80, 70), "grey").save(folder / f"{n}.png")
        (folder / "5.png").write_bytes(b"")
        return folder

    def test_a_cache_gives_what_the_pictures_do(self, found, cached, train):
        raw = found()
        train(raw)
        from_cache = cached(raw)
        train(from_cache)
        assert distance(weights(from_cache), weights(raw)) < 1e-4
        assert adapter_file.load(newest(from_cache)).spec.variant == "faceid"

    def test_pictures_without_a_face_are_left_out_and_named(
        self, found, cached, crowd, train, caplog
    ):
        raw = found(train_data_dir=str(crowd), max_train_steps=6)
        with caplog.at_level("WARNING"):
            train(raw)
        lines = Path(raw.output_dir, "broken-pictures-0.txt").read_text().splitlines()
        assert sorted(line.split(": ")[0] for line in lines) == ["3.png", "5.png", "7.png"]
        assert all("No face was found" in line for line in lines if "5.png" not in line)
        assert "left out: 3.png: No face was found" in caplog.text
        from_cache = cached(raw)
        rows = CachedDataset(from_cache.feature_cache_dir, "face_embeds", cache.NO_DRAWS)
        assert len(rows) == COUNT - 3
        assert sorted(rows.broken) == sorted(lines)

    def test_the_face_is_that_of_the_reference_picture(self, found, crowd, people):
        listing = crowd / "metadata.jsonl"
        lines = listing.read_text().replace("}", ', "reference_file_name": "0.png"}')
        listing.write_text(lines)
        trainer = Trainer(found(train_data_dir=str(crowd)))
        batch = next(trainer.batches)
        sound = batch["reference"][batch["weight"] > 0]
        expected = trainer.encoders.image_encoder.preprocess(Image.open(people / "0.png"))
        assert torch.equal(sound, expected.expand_as(sound))

    def test_the_largest_face_is_taken(self, tmp_path):
        folder = faces.write_pack(tmp_path / "pack", confident=-1.0)
        picture = image_folders.image(0, (80, 70))
        pixels = torch.from_numpy(np.array(picture)) / 255
        encoder = FaceEncoder(folder, single=True)
        several = encoder.faces(pixels)
        embeds = encoder.embed(torch.stack([aligned(pixels, face.points) for face in several]))
        largest = int(torch.tensor([face.area for face in several]).argmax())
        assert largest, "it is another than the surest"
        assert torch.equal(EmbedFace(str(folder))(picture), embeds[largest])

    def test_the_pack_may_move_and_not_change(self, found, pack, tmp_path, train):
        config = found(max_train_steps=2)
        train(config)
        about = safe_open(newest(config), "pt").metadata()["ip_adapter"]
        assert '"face_encoder": "buffalo_l"' in about and str(pack.parent) not in about
        moved = shutil.copytree(pack, tmp_path / "moved")
        train(replace(config, face_encoder=str(moved), max_train_steps=3))
        assert adapter_file.load(newest(config)).lora
        other = faces.write_pack(tmp_path / "other", seed=5, confident=-2.0)
        with pytest.raises(TrainingError, match=r"face encoder was .* is "):
            train(replace(config, face_encoder=str(other), max_train_steps=4))

    def test_workers_find_the_same(self, found):
        first = [next(Trainer(found(dataloader_num_workers=n)).batches) for n in (0, 2)]
        assert torch.equal(first[0]["reference"], first[1]["reference"])

    def test_a_cache_of_another_encoder_or_column(self, found, given, cached, tmp_path, train):
        other = faces.write_pack(tmp_path / "other", seed=5, confident=-2.0)
        from_cache = cached(found())
        said = r"not made for this run\. face encoder: the cache's is '.*buffalo_l"
        for changes in (
            {"face_encoder": str(other)},
            {"face_embedding_column": "id"},
        ):
            with pytest.raises(TrainingError, match=said):
                train(replace(from_cache, **changes))
        with pytest.raises(TrainingError, match=r"differs in: face encoder \(there .*buffalo_l"):
            cached(found(), face_encoder=str(other))
        by_column = cached(given(), "by-column")
        with pytest.raises(TrainingError, match=r"is 'the column id'.*run's is 'the column face'"):
            train(replace(by_column, face_embedding_column="face"))

    @pytest.mark.parametrize("column", [None, "id"])
    def test_samples(self, found, people, train, column):
        """They have the LoRA, whatever λ is; with a column, the encoder reads these alone."""
        watch = {"validation_steps": 2, "validation_image": [str(people / "0.png")]}
        watch |= {"validation_scale": [0.0, 1.0], "validation_num_inference_steps": 2}
        config = found(face_embedding_column=column, max_train_steps=2, learning_rate=1e-2, **watch)
        trainer = train(config)
        assert Path(config.output_dir, "validation", "step-000002.png").is_file()
        adapter, unweighted = trainer.sampled(), [0]  # the first cell: λ is 0
        drawn = np.asarray(trainer.validation._draw(adapter, unweighted)[0].image)
        state = adapter.state_dict()
        adapter.load_state_dict({k: v * ("lora.up" not in k) for k, v in state.items()})
        without = np.asarray(trainer.validation._draw(adapter, unweighted)[0].image)
        assert (drawn != without).any()

    def test_a_reference_without_a_face_is_told_before_training(self, found, crowd, train):
        pictures = [str(crowd / "3.png"), str(crowd / "0.png")]
        with pytest.raises(TrainingError, match=r"1 of 2 .*'.*3\.png' \(No face was found"):
            train(found(validation_steps=2, validation_image=pictures))

    def test_a_pack_that_lacks_a_file(self, found, tmp_path, train):
        with pytest.raises(TrainingError, match=r"lacks det_10g\.onnx or"):
            train(found(face_encoder=str(tmp_path)))


def test_from_a_published_one(given, tmp_path, train):
    first = given()
    train(first)
    second = replace(
        first,
        **{"output_dir": str(tmp_path / "second"), "learning_rate": 0.0, "adam_weight_decay": 0.0},
        pretrained_ip_adapter_path=str(newest(first)),
    )
    train(second)
    before, after = load_file(newest(first)), load_file(newest(second))
    assert all(torch.equal(before[k], after[k]) for k in before)
    small = {
        k: v[:8] if "lora.down" in k else v[:, :8] if "lora.up" in k else v
        for k, v in before.items()
    }
    for rank, state in (
        ("8", small),
        ("none", {k: v for k, v in before.items() if "lora" not in k}),
    ):
        path = tmp_path / "other.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        other = replace(second, pretrained_ip_adapter_path=str(path))
        with pytest.raises(TrainingError, match=f"LoRA of rank {rank}; expected 128"):
            train(replace(other, output_dir=str(tmp_path / rank)))


def test_evaluation_refuses_faces(tmp_path):
    save_file(faces.tensors("faceid", (32, 32), 32), tmp_path / "face.safetensors")
    with pytest.raises(TrainingError, match=r"face\.safetensors' reads faces \(FaceID\)"):
        adapters.load([str(tmp_path / "face.safetensors")])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"face_embedding_column": None}, "reads faces, of --face_encoder .*none is given"),
        ({"image_encoder_path": "a"}, "variant faceid reads faces.*image_encoder_path is 'a'"),
        ({"variant": "base"}, "base reads images.*but face_embedding_column is 'id'"),
        (
            {"variant": "base", "face_embedding_column": None},
            "base reads images, of --image_encoder_path .*none is given",
        ),
        (
            {"validation_steps": 1, "validation_image": ["a.png"]},
            "--face_encoder FOLDER beside the column",
        ),
    ],
)
def test_options_that_do_not_go_together(given, changes, said):
    with pytest.raises(TrainingError, match=said):
        given(**changes)


def test_the_loss_of_rows_held_out_needs_no_face_encoder(given, people, tmp_path, train, caplog):
    shutil.copytree(people, folder := tmp_path / "people")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace("}", ', "split": "val"}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    held_out = {"validation_steps": 1, "validation_split_column": "split", "max_train_steps": 1}
    with caplog.at_level("INFO", "training"):
        train(given(train_data_dir=str(folder), **held_out))
    assert re.search(r"step 1: validation loss \d+\.\d+$", caplog.text, re.MULTILINE)


def test_a_cache_of_faces_wants_a_face_encoder(tmp_path):
    common = {"pretrained_model_name_or_path": "a", "output_dir": "b", "train_data_dir": "c"}
    with pytest.raises(TrainingError, match="features face_embeds reads faces"):
        cache.CacheConfig(**common, features="face_embeds", image_encoder_path="d")
    with pytest.raises(TrainingError, match=r"features both reads images.*face_encoder is 'd'"):
        cache.CacheConfig(**common, features="both", face_encoder="d")
