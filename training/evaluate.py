"""Measure adapters as the paper's Table 1 does. The commands:

    accelerate launch training/evaluate.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --image_encoder open_clip:ViT-H-14/laion2b_s32b_b79k --coco coco \\
        --adapter run/ip-adapter.safetensors ip-adapter_sd15.bin --out scores

`coco` holds val2017/ and annotations/captions_val2017.json, or is any folder of pictures with
captions. A quick look at the first 50 pictures, with the image alone:

    accelerate launch training/evaluate.py … --limit 50 --weights '[]'

The same command goes on where the last one stopped, with more pictures, weights or adapters too;
what is measured is not drawn again. Every process of `accelerate launch` takes its part; on
several machines `--out` must be one folder that all see. Written are results.json, table.md and
weights.png. Every setting: `evaluate.py --help`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script: what is imported lies beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import PartialState
from tqdm import tqdm

from training import fingerprints
from training.data.image import BrokenImageError, open_image
from training.errors import TrainingError
from training.evaluation import captions, report, scores, subjects
from training.evaluation.clip_score import Clip, clip_i, clip_t, load_clip
from training.evaluation.scores import IMAGE_ONLY, WITH_TEXT, Condition, Key, Score
from training.evaluation.settings import EvaluationSettings, parse
from training.folders import make_writable
from training.launch import begin
from training.models.base import Base, load_base
from training.models.image_encoder import ImageEncoder
from training.prompts import Prompts, encode_pictures, encode_text
from training.sampling import NotFinite, Sampler
from training.unet import attach

WAIT = 2.0  # seconds between looks at what the other processes have done
logger = logging.getLogger("training")


class Evaluation:
    """Everything loaded and seen to fit; then `run`.

    Raises TrainingError before anything is drawn if something is missing or does not fit.
    """

    def __init__(self, settings: EvaluationSettings, state: PartialState) -> None:
        self.settings, self.state = settings, state
        self.folder = Path(settings.out)
        # From what fails at once to what takes minutes.
        self.rows = captions.read(settings.coco)
        self.numbers = range(len(self.rows))[: settings.limit]
        captions.check_present(self.rows, self.numbers)
        make_writable(self.folder)
        self.adapters = subjects.load(settings.adapter)
        self.clip: Clip = load_clip(settings.clip, state.device)
        dtype = getattr(torch, settings.dtype)
        self.encoder = ImageEncoder.from_name(settings.image_encoder, dtype)
        self.base: Base = load_base(settings.base, dtype)
        for subject, adapter in self.adapters:
            subjects.check_fits(adapter, subject.name, self.base.unet, self.encoder)
        attach(self.base.unet)
        texts = (encoder for _, encoder in self.base.text)
        frozen: tuple[Any, ...] = (self.encoder, self.base.unet, self.base.vae, *texts)
        for part in (*frozen, *(adapter for _, adapter in self.adapters)):
            part.to(state.device)
        self.sampler = Sampler(self.base, settings.sampling)
        self.protocol = self._protocol()
        scores.claim(self.folder, self.protocol)

    def _protocol(self) -> dict[str, Any]:
        """What all scores of one table must have in common."""
        names = ("base", "image_encoder", "clip")
        chosen = ("samples", "steps", "guidance", "negative", "seed", "dtype")
        unet: Any = self.base.unet
        weights = fingerprints.of_weights(unet), dict(self.base.weights)
        return {
            **{name: getattr(self.settings, name) for name in (*names, *chosen)},
            "size": list(self.sampler.size),
            "data": captions.fingerprint(self.rows),
            "base_weights": fingerprints.of_settings(*weights),
            "image_encoder_weights": self.encoder.weights,
            "clip_weights": self.clip.fingerprint(),
        }

    @property
    def conditions(self) -> list[Condition]:
        """Of all adapters."""
        weights = self.settings.weights
        return [c for s, _ in self.adapters for c in report.conditions(s.digest, weights)]

    def blocks(self, found: scores.Found) -> list[range]:
        """Rows that are drawn together, those that are not done.

        They are the same whatever the number of processes and whatever was done before, and are
        drawn whole: arithmetic on a batch depends in its last bits on what else is in it.
        """
        size = max(1, self.settings.batch // self.settings.samples)
        blocks = [self.numbers[start : start + size] for start in self.numbers[::size]]
        return [block for block in blocks if any(self._lacking(block, found))]

    def _lacking(self, block: range, found: scores.Found) -> Iterator[Condition]:
        """Conditions that the block is not measured under."""
        for condition in self.conditions:
            keys = (Key(condition, row, sample) for row in block for sample in self._samples)
            if any(key not in found.scores for key in keys if key.row not in found.broken):
                yield condition

    @property
    def _samples(self) -> range:
        return range(self.settings.samples)

    def run(self) -> dict[str, Any] | None:
        """Draw and score what is lacking; the main process writes and returns the results."""
        state = self.state
        found = scores.read(self.folder)
        state.wait_for_everyone()  # all have read, so all divide the same work
        # From here on nobody waits in a group; one that lives until its process ends can abort it.
        state.destroy_process_group()
        blocks = self.blocks(found)[state.process_index :: state.num_processes]
        writer = scores.Writer(self.folder, state.process_index)
        for block in tqdm(blocks, "blocks", disable=not state.is_main_process):
            self._measure(block, [*self._lacking(block, found)], writer)
        if not state.is_main_process:
            return None
        # Others may be slower by hours, which no process group's timeout allows for. If one ends
        # with an error, the launcher ends this one too.
        while self.blocks(found := scores.read(self.folder)):
            time.sleep(WAIT)
        names = {row: self.rows[row].name for row in self.numbers}
        listed = [subject for subject, _ in self.adapters]
        weights = self.settings.weights
        out = report.results(self.protocol, listed, weights, self.numbers, names, found)
        report.write(out, self.folder)
        return out

    def _measure(
        self, block: range, conditions: Sequence[Condition], writer: scores.Writer
    ) -> None:
        """All samples of a block under some conditions."""
        rows, pictures = [], []
        for row in block:
            try:
                pictures.append(open_image(self.rows[row].image))
                rows.append(row)
            except BrokenImageError as error:
                logger.warning("'%s' is left out: %s", self.rows[row].name, error)
                writer.broken(row, str(error))
        if not rows:
            return
        texts = [self.rows[row].text for row in rows]
        references, told = self.clip.images(pictures), self.clip.texts(texts)
        keep = [(place, sample) for place in range(len(rows)) for sample in self._samples]
        places = [place for place, _ in keep]
        seeds = [self.settings.seed + rows[p] * self.settings.samples + s for p, s in keep]
        adapters = {subject.digest: adapter for subject, adapter in self.adapters}
        kinds = {adapter.spec.features for adapter in adapters.values()}
        features = {kind: encode_pictures(self.encoder, pictures, kind) for kind in kinds}
        written = {IMAGE_ONLY: [""] * len(rows), WITH_TEXT: texts}
        states = {prompt: encode_text(self.base, text) for prompt, text in written.items()}
        for condition in conditions:
            adapter = adapters[condition.adapter]
            positive, zero = features[adapter.spec.features]
            asked = Prompts(
                text=states[condition.prompt][places],
                features=positive[places],
                zero=zero,
                weights=[condition.weight] * len(keep),
                seeds=seeds,
            )
            drawn = self.clip.images(self.sampler.draw(adapter, asked))
            like, true = clip_i(drawn, references[places]), clip_t(drawn, told[places])
            writer.scores(
                (Key(condition, rows[place], sample), Score(*pair))
                for (place, sample), *pair in zip(keep, like.tolist(), true.tolist(), strict=True)
            )


def evaluate(settings: EvaluationSettings) -> dict[str, Any] | None:
    """Measure and write; returns the results on the main process, None on the others. Of several
    processes it ends the group, so that a launch of several measures once.

    Raises TrainingError for what a user can mend, NotFinite if a picture becomes NaN.
    """
    return Evaluation(settings, begin()).run()


def main() -> None:
    """The command line."""
    try:
        state = begin()
        settings = parse()
        level = logging.INFO if state.is_main_process else logging.WARNING
        logging.basicConfig(format="%(message)s")
        logger.setLevel(level)
        results = evaluate(settings)
    except (TrainingError, NotFinite) as error:
        sys.exit(f"evaluate.py: {error}")
    if results is not None:
        logger.info("\n%s\nWritten to '%s'.", report.table(results), settings.out)


if __name__ == "__main__":
    main()
