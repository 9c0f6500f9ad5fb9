"""Small random Hugging Face folders with a tokenizer of a few words, and texts for them; written when asked for."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autoprune import plugins
from tests.transformer_models import MISSING

WORDS = tuple(f"{a}{b}" for a in "bdfgkl" for b in "aeiou")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIZES = {
    **{"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0},
}
MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", SIZES),
    "classifier": ("BertConfig", "BertForSequenceClassification", {**SIZES, "num_labels": 3}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2, "bos_token_id": 2}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "bos_token_id": None}),
}
TEXT_TASKS = ("causal_lm", "text_classification", "text_embedding")


def write_model(folder: Path, name: str, tokenizer: bool = True) -> Path:
    """One of `MODELS` with random weights, as transformers writes it, and the tokenizer."""
    library = pytest.importorskip("transformers", reason=MISSING)
    config, kind, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(library, kind)(getattr(library, config)(**settings))
        for module in model.modules():  # fresh ones have weights near 0, and say the same of every text
            if isinstance(module, torch.nn.Embedding | torch.nn.Linear):
                torch.nn.init.normal_(module.weight, 0.0, 0.2)
    library.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder / "tokenizer.json")
    return folder


def write_tokenizer(path: Path) -> None:
    """A word is a token, [CLS] and [SEP] stand around a text."""
    tokenizers = pytest.importorskip("tokenizers", reason=MISSING)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    around = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    made.save(str(path))


def sentence(rng: np.random.Generator, most: int = 8) -> str:
    """A few random words."""
    return " ".join(rng.choice(WORDS, size=int(rng.integers(1, most + 1))))


def write_rows(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    """A table, separated as its ending says."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows(rows)
    return path


def write_pairs(path: Path, n: int, seed: int = 0) -> Path:
    """Pairs of sentences and the share of words that they have in common, without a header."""
    rng = np.random.default_rng(seed)
    pairs = [(sentence(rng), sentence(rng)) for _ in range(n)]
    return write_rows(path, [(a, b, f"{len(set(a.split()) & set(b.split())) + rng.random():.2f}") for a, b in pairs])


def write_labelled(path: Path, n: int, seed: int = 0, header: Sequence[str] = ("label", "content")) -> Path:
    """Sentences labelled by how many words they have, with a header."""
    rng = np.random.default_rng(seed)
    texts = [sentence(rng) for _ in range(n)]
    return write_rows(path, [header, *((min(2, len(text.split()) // 3), text) for text in texts)])


def write_text(path: Path, words: int, seed: int = 0) -> Path:
    """Random words."""
    path.write_text(" ".join(np.random.default_rng(seed).choice(WORDS, size=words)), encoding="utf-8")
    return path


def arguments(root: Path, name: str) -> dict[str, Any]:
    """Arguments of one of `TEXT_TASKS`, its files in `root`."""
    if name == "causal_lm":
        texts = {key: write_text(root / f"{key}.txt", n, n) for key, n in (("train", 3000), ("test", 500))}
        return {"model": write_model(root / "llama", "llama"), **texts, "context": 16}
    if name == "text_classification":
        tables = {key: write_labelled(root / f"{key}.tsv", n, n) for key, n in (("train", 240), ("test", 40))}
        return {"model": write_model(root / "bert", "bert"), **tables, "max_length": 16}
    tables = {key: write_pairs(root / f"{key}.csv", n, n) for key, n in (("train", 240), ("test", 40))}
    return {"model": write_model(root / "bert", "bert"), **tables, "max_length": 16}


def make(root: Path, name: str) -> Any:
    """One of `TEXT_TASKS` over files in `root`."""
    return plugins.load("tasks", name)(**arguments(root, name))


def set_config(folder: Path, **values: Any) -> None:
    """Other values in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_tensor(folder: Path, ending: str) -> None:
    """Weights without the tensors whose names end so."""
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(ending)}
    save_file(kept, path, metadata={"format": "pt"})
