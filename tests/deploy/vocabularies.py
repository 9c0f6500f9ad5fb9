"""Small tokenizers of the kinds that llama.cpp knows, trained when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoprune.deploy._gguf_vocabulary import DIGITS, WORDS
from tests.transformer_models import MISSING

VOCABULARIES = ("llama-bpe", "qwen2", "smollm", "gpt-2", "characters")
TEXT = [
    "pruned models are smaller models, and 1000 layers of 12345 neurons are 3.14 times as many as it's worth\n",
    "we'll see what's left   of them:\n\n\tnothing, in 2 of 10 cases; 'tis a pity that they don't say so\n",
]
SENTENCES = (
    "Hello world, it's 12345 tests!\n\n  We'll see   3.14 - naïve café x",
    "def f(x):\n    return x+1\n\t# done",
    " leading and    wide",
)
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))


def vocabulary(kind: str, path: Path) -> Any:
    """A tokenizer of one of `VOCABULARIES`, also saved; the last kind falls back on bytes and begins with <s>."""
    library = pytest.importorskip("tokenizers", reason=MISSING)
    return _characters(library, path) if kind == "characters" else _bytes(library, kind, path)


def _bytes(library: Any, kind: str, path: Path) -> Any:
    before = library.pre_tokenizers
    plain, split = before.ByteLevel(add_prefix_space=False, use_regex=False), before.ByteLevel(add_prefix_space=False)
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = {
        "llama-bpe": lambda: before.Sequence([before.Split(library.Regex(WORDS % DIGITS), "isolated"), plain]),
        "qwen2": lambda: before.Sequence([before.Split(library.Regex(WORDS % ""), "isolated"), plain]),
        "smollm": lambda: before.Sequence([before.Digits(individual_digits=True), split]),
        "gpt-2": lambda: split,
    }[kind]()
    made.decoder = library.decoders.ByteLevel()
    alphabet = before.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    made.save(str(path))
    return made


def _characters(library: Any, path: Path) -> Any:
    made = library.Tokenizer(library.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    trainer = library.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    single, special = "<s> $A", [("<s>", 1)]
    made.post_processor = library.processors.TemplateProcessing(single=single, special_tokens=special)
    told = json.loads(made.to_str())
    words = told["model"]["vocab"]
    words |= {byte: len(words) + i for i, byte in enumerate(BYTES)}
    made = library.Tokenizer.from_str(json.dumps(told))
    made.save(str(path))
    return made
