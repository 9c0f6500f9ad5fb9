"""What is wrong with the files of a task over a Hugging Face folder is one line."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoprune.errors import InputError
from autoprune.tasks.causal_lm import causal_lm
from autoprune.tasks.text_classification import text_classification
from autoprune.tasks.text_embedding import text_embedding
from tests import text_folders
from tests.text_folders import WORDS, write_pairs, write_rows, write_text

Files = Callable[[str], dict[str, Any]]
pytestmark = pytest.mark.usefixtures("own_cache")


def missing_model(root: Path, args: dict[str, Any]) -> None:
    args["model"] = root / "sentence-transformers" / "all-MiniLM-L6-v2"


def no_config(root: Path, args: dict[str, Any]) -> None:
    (args["model"] / "config.json").unlink()


def broken_config(root: Path, args: dict[str, Any]) -> None:
    (args["model"] / "config.json").write_text("{")


def unknown_kind(root: Path, args: dict[str, Any]) -> None:
    text_folders.set_config(args["model"], model_type="nothing_known")


def remote_code(root: Path, args: dict[str, Any]) -> None:
    text_folders.set_config(args["model"], model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    (args["model"] / "own.py").write_text("raise SystemExit('code of a folder was run')")


def pickled(root: Path, args: dict[str, Any]) -> None:
    (args["model"] / "model.safetensors").rename(args["model"] / "pytorch_model.bin")


def cut_short(root: Path, args: dict[str, Any]) -> None:
    whole = (args["model"] / "model.safetensors").read_bytes()
    (args["model"] / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lacking(root: Path, args: dict[str, Any]) -> None:
    text_folders.drop_tensor(args["model"], "1.output.dense.weight")


def no_tokenizer(root: Path, args: dict[str, Any]) -> None:
    (args["model"] / "tokenizer.json").unlink()


def bad_tokenizer(root: Path, args: dict[str, Any]) -> None:
    (args["model"] / "tokenizer.json").write_text("{}")


def no_file(root: Path, args: dict[str, Any]) -> None:
    args["train"] = root / "nothing.csv"


def one_file(root: Path, args: dict[str, Any]) -> None:
    args["test"] = args["train"]


def few_rows(root: Path, args: dict[str, Any]) -> None:
    args["train"] = write_pairs(root / "few.csv", 29)


def no_column(root: Path, args: dict[str, Any]) -> None:
    args["columns"] = [0, 1, 3]


def unknown_name(root: Path, args: dict[str, Any]) -> None:
    for key in ("train", "test"):
        args[key] = write_rows(root / f"{key}-named.csv", [("first", "second", "score"), *[("a", "b", 1)] * 40])
    args["columns"] = ["first", "secnd", "score"]


def two_columns(root: Path, args: dict[str, Any]) -> None:
    args["columns"] = ["first", "score"]


def no_score(root: Path, args: dict[str, Any]) -> None:
    args["train"] = write_rows(root / "bad.csv", [*[("a", "b", 1)] * 40, ("a", "b", "much")])


def short_row(root: Path, args: dict[str, Any]) -> None:
    args["train"] = write_rows(root / "bad.csv", [*[("a", "b", 1)] * 40, ("a", "b")])


def too_long(root: Path, args: dict[str, Any]) -> None:
    args["max_length"] = 64
    args["train"] = write_rows(root / "long.csv", [(" ".join(WORDS * 2), "b", i) for i in range(40)])


MISTAKES = {
    missing_model: r"task.args.model: no folder .*all-MiniLM-L6-v2; it must be a local one .* names of the hub are not",
    no_config: r"holds no config.json, so it is no Hugging Face folder",
    broken_config: r"config.json cannot be read",
    unknown_kind: r"transformers cannot load .* by AutoModel: .*nothing_known",
    remote_code: r"brings code of its own \(auto_map in config.json\), which is not run: .* has no model 'own'",
    pickled: r"holds pytorch_model.bin, which may run code when it is read, and no model.safetensors; write one",
    cut_short: r"transformers cannot load .* by AutoModel",
    lacking: r"have no tensor '.*1.output.dense.weight', which BertModel needs",
    no_tokenizer: r"holds no tokenizer.json; write one with transformers",
    bad_tokenizer: r"tokenizer.json is no tokenizer",
    no_file: r"task.args.train: no file .*nothing.csv",
    one_file: r"task.args.train and task.args.test are the same file",
    few_rows: r"few.csv has 29 rows; at least 30 are needed",
    no_column: r"task.args.columns: .*train.csv has no column 3; it has the positions 0 to 2",
    unknown_name: r"train-named.csv has no column 'secnd'; did you mean 'second'",
    two_columns: r"task.args.columns must be 3 positions or names \(text, text, score\), not \['first', 'score'\]",
    no_score: r"bad.csv, line 41: 'much' is no number",
    short_row: r"bad.csv, line 41: it has 2 columns; column 2 is asked for",
    too_long: r"task.args.max_length: 62 tokens at once are more than the model's 40 positions",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_is_one_line(mistake: Any, files: Files, tmp_path: Path) -> None:
    args = files("text_embedding")
    args["model"] = Path(shutil.copytree(args["model"], tmp_path / "model"))
    mistake(tmp_path, args)
    with pytest.raises(InputError, match=MISTAKES[mistake]) as caught:
        text_embedding(**args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "task.args.context must be a whole number from 2, not 1"),
        ({"context": 64}, "task.args.context: 64 tokens at once are more than the model's 40 positions"),
        ({"context": 32, "tokens": 500}, "train.txt is too short: its 500 tokens are 15 windows of 32; at least 30"),
        ({"context": 2, "tokens": 501}, "task.args.tokens: .*test.txt has 500 tokens; at most 500 are allowed"),
        ({"test": "short.txt"}, r"short.txt is too short: it has 9 tokens, a window 16"),
        ({"test": "far.npy"}, r"far.npy: its ids go from 40 to 40, the model knows 0 to 33"),
        ({"test": "float.npy"}, r"float.npy: must hold whole numbers \[tokens\], not float64 \[99\]"),
        ({"test": "no.txt"}, r"task.args.test: no file .*no.txt"),
    ],
)
def test_a_text_that_does_not_do_is_one_line(
    changes: dict[str, Any], message: str, files: Files, tmp_path: Path
) -> None:
    write_text(tmp_path / "short.txt", 9)
    np.save(tmp_path / "far.npy", np.full(99, 40))
    np.save(tmp_path / "float.npy", np.ones(99))
    placed = {key: tmp_path / value if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message) as caught:
        causal_lm(**{**files("causal_lm"), **placed})
    assert "\n" not in str(caught.value)


def test_without_the_library_its_extra_is_named(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    args = files("causal_lm")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        InputError, match=r"needs the package 'transformers', .*pip install 'autoprune\[transformers\]'"
    ):
        causal_lm(**args)


def test_labels_that_are_no_classes_are_told_from_them(files: Files, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.tsv", [(f"a{i}", i) for i in range(40)])
    test = write_rows(tmp_path / "test.tsv", [("a", 1), ("b", 2)])
    with pytest.raises(InputError, match="has 40 different labels in 40 rows; classes have two rows each or more"):
        text_classification(files("text_classification")["model"], train, test, columns=[0, 1])
