"""The T5 tokenizer of both demo models: whole words of the captions first, single characters for everything else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LETTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789,.-'"
T5_CONFIG = {
    "tokenizer_class": "T5Tokenizer",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "extra_ids": 0,
}


def word_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """A unigram tokenizer in which every word of the captions is one token."""
    words = sorted({"▁" + word.strip(",") for caption in captions for word in caption.split()})
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -50.0),
        *((word, -5.0) for word in words),
        *((letter, -20.0) for letter in LETTERS if letter not in words),
    ]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return unigram


def save_tokenizer(folder: Path, tokenizer: Tokenizer, config: dict) -> None:
    """Write tokenizer.json and tokenizer_config.json, which both transformers 4 and 5 read: what 5 writes, 4 cannot."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
