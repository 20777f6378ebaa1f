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


@lru_cache
def tokenizer(pad: str = END) -> CLIPTokenizer:
    """Return the tokenizer of SD1.5 and of SDXL's first text encoder; with `pad` "!", its second's.

    `pad` fills texts up to 77 tokens.
    """
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
    files = {
        "vocab.json": json.dumps({word: number for number, word in enumerate(words)}),
        "merges.txt": "\n".join(["#version: 0.2", *merges]),
        "tokenizer_config.json": json.dumps(config),
    }
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)
