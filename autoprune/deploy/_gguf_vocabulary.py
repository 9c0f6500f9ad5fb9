"""The vocabulary of a GGUF file from the tokenizer.json of a Hugging Face folder, where llama.cpp has the same kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoprune.errors import AutopruneError
from autoprune.files.whole import read_mapping

TOKENIZER = "tokenizer.json"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
ENDS = ("bos", "eos")
DIGITS = "{1,3}"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[tuple[Any, ...], str] = {
    (("Split", WORDS % DIGITS), ("ByteLevel", False)): "llama-bpe",
    (("Split", WORDS % ""), ("ByteLevel", False)): "qwen2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
}
"""How texts are split before bytes are joined, as tokenizer.json has it, and what llama.cpp calls that."""


def add_vocabulary(gguf: Any, writer: Any, folder: Path, config: Any) -> str:
    """Write the tokenizer of `folder` for a model of this configuration; why there is none instead, "" where there is.

    Byte-level pairs that are split as those of Llama 3, Qwen2, SmolLM or GPT-2, and pairs of characters that fall back
    on bytes, as those of Llama 2 and Mistral.
    """
    size = config.vocab_size
    reason, told = _readable(folder / TOKENIZER)
    if not reason:
        reason = _lacking(told, size)
    if reason:
        writer.add_tokenizer_model("none")
        return reason
    model, tokens = told["model"], _tokens(told, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model, tokens))
        writer.add_add_space_prefix(_prefixed(told))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(SPLITS[_splits(told)])
    writer.add_token_list(tokens)
    writer.add_token_types(_kinds(gguf, told, tokens))
    special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=size)
    for name in ENDS:
        number = getattr(config, f"{name}_token_id", None)
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < size:
            special.special_token_ids.setdefault(name, number)
        special.add_special_token.setdefault(name, False)  # llama.cpp has habits of its own
    special.add_to_gguf(writer, quiet=True)
    return ""


def _readable(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return f"the model's folder has no {TOKENIZER}", {}
    try:
        return "", read_mapping(path)
    except AutopruneError as error:
        return str(error), {}


def _lacking(told: Mapping[str, Any], size: int) -> str:
    """Why llama.cpp has no such tokenizer; "" where it has."""
    model = told.get("model") or {}
    if model.get("type") != "BPE":
        return f"llama.cpp has no tokenizer of the type {model.get('type')}"
    highest = max([*model["vocab"].values(), *(t["id"] for t in told.get("added_tokens") or ())], default=0)
    if highest >= size:
        return f"{TOKENIZER} counts up to token {highest}, the model has {size}"
    if not model.get("byte_fallback") and _splits(told) not in SPLITS:
        return f"none of {', '.join(SPLITS.values())} splits texts as {TOKENIZER} does"
    return ""


def _splits(told: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is done to a text before bytes are joined, in the form of `SPLITS`."""
    given = told.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given]) if isinstance(given, dict) else []
    found = []
    for step in steps:
        pattern = step.get("pattern") or {}
        said = {"Split": pattern.get("Regex"), "ByteLevel": step.get("use_regex", True)}
        said["Digits"] = step.get("individual_digits")
        if step.get("add_prefix_space"):
            return ()
        found.append((step.get("type"), said.get(str(step.get("type")))))
    return tuple(found)


def _tokens(told: Mapping[str, Any], size: int) -> list[str]:
    """All tokens by their numbers; numbers that the model has and the tokenizer has not are padding."""
    known = {i: token for token, i in told["model"]["vocab"].items()}
    known |= {t["id"]: t["content"] for t in told.get("added_tokens") or ()}
    return [known.get(i, f"[PAD{i}]") for i in range(size)]


def _kinds(gguf: Any, told: Mapping[str, Any], tokens: list[str]) -> list[Any]:
    """What each token is to llama.cpp."""
    kinds, model = gguf.TokenType, told["model"]
    special = {t["id"]: bool(t.get("special")) for t in told.get("added_tokens") or ()}
    fallback = bool(model.get("byte_fallback"))

    def kind(number: int, token: str) -> Any:
        if number not in special and model["vocab"].get(token) != number:
            return kinds.UNUSED
        if fallback and token == model.get("unk_token"):
            return kinds.UNKNOWN
        if number in special:
            return kinds.CONTROL if special[number] else kinds.USER_DEFINED
        return kinds.BYTE if fallback and BYTE.fullmatch(token) else kinds.NORMAL

    return [kind(i, token) for i, token in enumerate(tokens)]


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Tokens that are joined earlier score higher: what llama.cpp joins by."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model.get("merges") or ()):
        ranks.setdefault("".join(pair.split(" ", 1) if isinstance(pair, str) else pair), rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _prefixed(told: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normal, split = told.get("normalizer") or {}, told.get("pre_tokenizer") or {}
    steps = [*normal.get("normalizers", [normal]), *split.get("pretokenizers", [split])]
    return any(s.get("type") == "Prepend" or s.get("prepend_scheme") in ("first", "always") for s in steps)
