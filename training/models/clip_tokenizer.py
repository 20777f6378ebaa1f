"""CLIP's tokenizer without a download: open_clip ships the vocabulary."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from open_clip.tokenizer import bytes_to_unicode, default_bpe
from transformers import CLIPTokenizer

LENGTH = 77  # tokens that CLIP's text encoders read
MERGES = 49152 - 256 - 2  # how many of the file's lines count (openai/CLIP, simple_tokenizer.py)
START, END = "<|startoftext|>", "<|endoftext|>"


def write(folder: Path, pad: str = END) -> None:
    """Write a tokenizer folder as transformers reads it; `pad` fills texts up to 77 tokens."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : MERGES + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges] + [START, END]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@lru_cache
def tokenizer(pad: str = END) -> CLIPTokenizer:
    """Return the tokenizer of SD1.5 and of SDXL's first text encoder.

    With `pad` "!", of its second.
    """
    with TemporaryDirectory() as folder:
        write(Path(folder), pad)
        return CLIPTokenizer.from_pretrained(folder)
