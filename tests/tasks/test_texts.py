"""The tasks over Hugging Face folders: outputs and metrics, padding that changes nothing, whole short searches."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import autoprune
from autoprune import plugins
from autoprune.errors import InputError
from autoprune.evaluator.fidelity import fidelity_for
from autoprune.families import analyze
from autoprune.files.job import Job
from autoprune.protocols import SPLITS, Task
from autoprune.tasks._texts import Padded, read_tables
from autoprune.tasks.causal_lm import causal_lm
from autoprune.tasks.text_classification import text_classification
from autoprune.tasks.text_embedding import cosines, text_embedding
from tests import text_folders
from tests.text_folders import TEXT_TASKS, WORDS, write_labelled, write_model, write_rows, write_text

DATA = Path(__file__).parents[3] / "shared" / "data"
needs = {
    name: pytest.mark.skipif(not (DATA / name).exists(), reason=f"needs shared/data/{name} beside the repository")
    for name in ("minilm_l6", "stories260K")
}
SEARCH = {
    "space": {"granularity": "auto", "multiple_of": 1},
    "budget": {"macs": [0.5, 0.95], "at": [0.8]},
    "search": {"trials": 8, "seed": 0, "window": 4},
    "evaluator": {
        **{"calibration": 48, "validation": 24, "finalists": 1, "finetune_steps": 3},
        **{"fitness": "refit", "sensitivity": 2},
    },
    "executor": {"kind": "inline"},
}


Files = Callable[[str], dict[str, Any]]
pytestmark = pytest.mark.usefixtures("own_cache")


def in_train(task: Task) -> int:
    """How many samples calibration, validation and train have together."""
    return sum(len(targets) for split in ("calibration", "validation", "train") for _, targets in task.split(split))


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_whole_search_runs_from_files_alone(name: str, files: Files, tmp_path: Path) -> None:
    args = {key: str(value) if isinstance(value, Path) else value for key, value in files(name).items()}
    args |= {"n_calibration": 48, "n_validation": 24}
    run = autoprune.search({"task": {"name": name, "args": args}, **SEARCH}, out=tmp_path / "run").finish()
    assert run.front
    point = run.front.select(macs=0.8)
    task = Job.from_dict({"task": {"name": name, "args": args}}).build_task()
    small = autoprune.apply(point, task.build(), task.example_inputs(), task=task)
    found = task.metrics(small, task.split("validation"))
    assert set(found) == set(task.directions)
    assert found == pytest.approx(dict(point.metrics["finetuned"]), rel=1e-3)
    kinds = {group.kind for group in point.base.groups}
    assert kinds == {"kv_group" if name == "causal_lm" else "head", "neuron", "block"}
    assert point.losses["validation"]["name"] == ("cosine" if name == "text_embedding" else "kl")


def padded_to(width: int, batch: tuple[dict[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    inputs = {name: F.pad(t, (0, width - t.shape[1])) for name, t in batch[0].items()}
    return inputs, batch[1]


@pytest.mark.parametrize("name", ["text_classification", "text_embedding"])
def test_padding_changes_no_output_no_loss_and_no_metric(name: str, files: Files) -> None:
    task = plugins.load("tasks", name)(**files(name))
    model, batches = task.build(), list(task.split("validation"))
    few, many = ([padded_to(width, batch) for batch in batches] for width in (16, 24))
    assert {b[0]["input_ids"].shape[1] for b in batches} == {16}, "the longest text has 10 tokens"
    chosen = fidelity_for(task, model, batches[0], "auto")
    with torch.no_grad():
        for one, two, plain in zip(few, many, batches, strict=True):
            dense = task.outputs(model, one)
            assert torch.equal(dense, task.outputs(model, plain))
            torch.testing.assert_close(task.outputs(model, two), dense, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(task.loss(model, two), task.loss(model, one), rtol=1e-5, atol=1e-7)
            assert float(chosen(task.outputs(model, two), dense).max()) < 1e-6
    assert task.metrics(model, few) == pytest.approx(task.metrics(model, many), abs=1e-6)


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_splits_are_disjoint_seeded_and_repeat(name: str, files: Files) -> None:
    make = plugins.load("tasks", name)
    task, same, other = (make(**files(name), seed=seed) for seed in (0, 0, 1))

    def samples(made: Any, split: str) -> list[bytes]:
        per = 2 if name == "text_embedding" else 1
        return [
            row.numpy().tobytes().rstrip(b"\0")
            for inputs, _ in made.split(split)
            for row in inputs["input_ids"].unflatten(0, (-1, per)).flatten(1).transpose(0, 0)
        ]

    for split in SPLITS:
        assert samples(task, split) == samples(same, split)
    assert samples(task, "calibration") != samples(other, "calibration")
    assert samples(task, "test") == samples(other, "test")
    counts = [made.samples for made in map(task.split, ("calibration", "validation", "train"))]
    total = 187 if name == "causal_lm" else 240
    assert counts == [round(0.3 * total), round(0.15 * total), total - round(0.3 * total) - round(0.15 * total)]
    inside = sorted(x for split in ("calibration", "validation", "train") for x in samples(task, split))
    assert inside == sorted(x for split in ("calibration", "validation", "train") for x in samples(other, split))


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_task_travels_to_machines_that_have_no_files(name: str, tmp_path: Path) -> None:
    task = text_folders.make(tmp_path, name)
    parcel = pickle.dumps(task)
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    there = pickle.loads(parcel)
    batch = next(iter(there.split("test")))
    assert torch.equal(there.outputs(there.build(), batch), task.outputs(task.build(), batch))


def test_a_text_is_the_unit_mean_of_its_own_tokens(files: Files) -> None:
    task = text_embedding(**files("text_embedding"))
    model, (inputs, scores) = task.build(), next(iter(task.split("test")))
    with torch.no_grad():
        vectors = task.outputs(model, (inputs, scores))
        for row in range(6):
            real = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
            mean = model(input_ids=real).last_hidden_state[0].mean(0)
            torch.testing.assert_close(vectors[row], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert (len(vectors), len(scores)) == (64, 32)
    torch.testing.assert_close(cosines(vectors), F.cosine_similarity(vectors[::2], vectors[1::2]))


def test_spearman_is_that_of_the_whole_split_whatever_the_batches(files: Files) -> None:
    from scipy.stats import spearmanr

    task = text_embedding(**files("text_embedding"))
    model, batches = task.build(), list(task.split("test"))
    assert len(batches) == 2
    with torch.no_grad():
        found = torch.cat([cosines(task.outputs(model, batch)) for batch in batches])
    scores = torch.cat([batch[1] for batch in batches])
    assert task.metrics(model, batches)["spearman"] == pytest.approx(spearmanr(found, scores).statistic)
    same = [(inputs, torch.ones_like(scores)) for inputs, scores in batches]
    assert task.metrics(model, same) == {"spearman": 0.0}


def test_a_head_is_fitted_once_and_better_than_none(files: Files, tmp_path: Path) -> None:
    args = files("text_classification")
    task = text_classification(**args)
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1
    assert kept[0].name.startswith("head-1-3-")
    before = kept[0].stat().st_mtime_ns
    again = text_classification(**args)
    assert kept[0].stat().st_mtime_ns == before
    batch = next(iter(task.split("test")))
    first = task.outputs(task.build(), batch)
    assert torch.equal(first, again.outputs(again.build(), batch))
    kept[0].write_bytes(b"no head")
    anew = text_classification(**args)
    assert torch.equal(first, anew.outputs(anew.build(), batch)), "a damaged one is fitted anew, to the same numbers"
    targets = torch.cat([labels for _, labels in task.split("train")])
    most = float(torch.bincount(targets).max() / len(targets))
    assert task.metrics(task.build(), task.split("train"))["accuracy"] > most + 0.1
    text_classification(**args, seed=1)
    assert len(list((tmp_path / "cache").iterdir())) == 2, "it is fitted to another train split"


def test_a_folder_with_a_head_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "classifier")
    text_folders.set_config(folder, id2label={0: "bad", 1: "so", 2: "good"}, label2id={"bad": 0, "so": 1, "good": 2})
    rows = [(WORDS[i % 30], ("bad", "so", "good", "2")[i % 4]) for i in range(40)]
    train = write_rows(tmp_path / "train.tsv", [("text", "mood"), *rows])
    test = write_rows(tmp_path / "test.tsv", rows[:9])
    task = text_classification(folder, train, test, columns=(0, 1), max_length=8)
    assert type(task.build()).__name__ == "BertForSequenceClassification"
    assert [y.tolist() for _, y in task.split("test")] == [[0, 1, 2, 2, 0, 1, 2, 2, 0]]
    assert in_train(task) == 40, "the header is no sample"
    assert not (tmp_path / "cache").exists()
    batch = next(iter(task.split("test")))
    assert task.outputs(task.build(), batch).shape == (9, 3)
    write_rows(test, [*rows[:9], ("ba", "god")])
    with pytest.raises(InputError, match=r"test.tsv: label 'god' is none of the model's; did you mean 'good'"):
        text_classification(folder, train, test, columns=(0, 1))


def test_each_window_is_led_by_the_configs_bos_unless_the_ids_hold_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "llama", "llama", tokenizer=False)
    ids = np.random.default_rng(0).integers(4, 34, 403).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    np.save(tmp_path / "b.npy", ids[:83])
    task = causal_lm(folder, tmp_path / "a.npy", tmp_path / "b.npy", context=10)
    inputs, targets = next(iter(task.split("test")))
    assert (inputs["input_ids"][:, 0] == 2).all()
    assert targets.flatten().tolist() == ids[:80].tolist()
    assert torch.equal(inputs["input_ids"][:, 1:], targets[:, :-1])
    assert in_train(task) == 40
    led = np.where(np.arange(403) % 7 == 0, 2, ids).astype(np.int64)
    np.save(tmp_path / "a.npy", led)
    task = causal_lm(folder, tmp_path / "a.npy", tmp_path / "b.npy", context=10)
    inputs, targets = next(iter(task.split("test")))
    assert inputs["input_ids"].flatten().tolist() == ids[:80].tolist()
    assert targets.flatten().tolist() == ids[1:81].tolist()


def test_perplexity_is_that_of_all_tokens(files: Files) -> None:
    task = causal_lm(**files("causal_lm"))
    model = task.build()
    logs = []
    with torch.no_grad():
        for inputs, targets in task.split("test"):
            logs.append(model(**inputs).logits.log_softmax(-1).gather(-1, targets[..., None]).flatten())
    mean = -float(torch.cat(logs).mean())
    assert task.metrics(model, task.split("test"))["perplexity"] == pytest.approx(math.exp(mean))
    assert sum(len(targets) for _, targets in task.split("test")) == 500 // 16


def test_one_file_may_be_train_and_test_where_they_do_not_meet(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "llama", "llama", tokenizer=False)
    ids = np.random.default_rng(0).integers(4, 34, 900).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    both: dict[str, Any] = {"train": tmp_path / "a.npy", "test": tmp_path / "a.npy"}
    task = causal_lm(folder, **both, context=10, tokens=400)
    assert torch.cat([y for _, y in task.split("test")]).flatten().tolist() == ids[-400:].tolist()
    with pytest.raises(InputError, match=r"has 900 tokens, and train and test share them; at most 450 are allowed"):
        causal_lm(folder, **both, context=10, tokens=451)
    with pytest.raises(InputError, match=r"are the same file .*a.npy; give two, or task.args.tokens"):
        causal_lm(folder, **both, context=10)


def test_a_model_without_a_bos_predicts_every_token_but_the_first(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "opt", "opt")
    train, test = write_text(tmp_path / "train.txt", 500), write_text(tmp_path / "test.txt", 41, 1)
    task = causal_lm(folder, train, test, context=10)
    words = test.read_text().split()
    seen = torch.cat([y for _, y in task.split("test")]).flatten().tolist()
    assert seen == [4 + WORDS.index(word) for word in words[1:]]


def test_half_precision_is_widened_and_nothing_of_it_is_random(tmp_path: Path, files: Files) -> None:
    args = files("text_embedding")
    shutil.copytree(args["model"], tmp_path / "half")
    library = pytest.importorskip("transformers")
    library.AutoModel.from_pretrained(args["model"]).half().save_pretrained(tmp_path / "half")
    text_folders.drop_tensor(tmp_path / "half", "pooler.dense.weight")
    before = torch.random.get_rng_state()
    task = text_embedding(**{**args, "model": tmp_path / "half"})
    assert torch.equal(before, torch.random.get_rng_state())
    assert {p.dtype for p in task.build().parameters()} == {torch.float32}
    double = task.build().double()
    batch = next(iter(task.split("test")))
    torch.testing.assert_close(
        task.outputs(double, batch).float(), task.outputs(task.build(), batch), rtol=1e-4, atol=1e-5
    )


def test_columns_by_name_in_two_headers_that_differ(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "train.tsv", 40, header=("label", "sentence"))
    test = write_labelled(tmp_path / "test.tsv", 5, seed=1)
    tables = read_tables(train, test, ["content", "label"], ("text", "label"), "label")
    assert tables.said == ("train.tsv has no column 'content'; 'sentence' in the same place is taken",)
    assert (len(tables.train.rows), len(tables.test.rows)) == (40, 5)
    assert read_tables(train, test, [1, 0], ("text", "label"), "label").train.rows == tables.train.rows


def test_a_header_is_found_by_its_score_and_quotes_are_read_in_csv_alone(tmp_path: Path) -> None:
    rows = [('say "a, b"', "two\nlines", "0.5"), *(("a", "b", str(i)) for i in range(40))]
    train = write_rows(tmp_path / "train.csv", [("one", "two", "how alike"), *rows])
    test = write_rows(tmp_path / "test.csv", rows)
    tables = read_tables(train, test, [0, 1, 2], ("text", "text", "score"), "score")
    assert tables.train.rows == tables.test.rows == tuple(rows)
    (tmp_path / "a.tsv").write_text('"to be" or not\t1\n' * 40)
    (tmp_path / "b.tsv").write_text('"not\t0\n' * 2)
    plain = read_tables(tmp_path / "a.tsv", tmp_path / "b.tsv", [0, 1], ("text", "label"), "label")
    assert plain.test.column(0) == ('"not', '"not')


def test_a_text_of_nothing_is_one_token_of_nothing() -> None:
    made = Padded.of([[], [5, 6]], torch.tensor([0.0, 1.0]), pad=3)
    ((inputs, _),) = list(made)
    assert inputs["input_ids"].tolist() == [[3] * 8, [5, 6, 3, 3, 3, 3, 3, 3]]
    assert inputs["attention_mask"].sum(1).tolist() == [1, 2]


@needs["minilm_l6"]
def test_minilm_ranks_the_sts_benchmark_as_measured() -> None:
    tables: dict[str, Any] = {
        "train": DATA / "sts_benchmark" / "stsb_dev.csv",
        "test": DATA / "sts_benchmark" / "stsb_test.csv",
    }
    task: Any = text_embedding(DATA / "minilm_l6", **tables, max_length=32)
    split, model = task.split("test"), task.build()
    longest = split.lengths.view(-1, 2).max(1).values.argsort().numpy()
    short_first = [batch for rows in np.array_split(longest, 20) for batch in split.rows_of(rows)]
    assert task.metrics(model, short_first)["spearman"] == pytest.approx(0.8181, abs=2e-4)


@needs["stories260K"]
def test_the_stories_have_the_perplexity_that_was_measured() -> None:
    ids = DATA / "stories260K" / "tiny_stories_ids.npy"
    task = causal_lm(DATA / "stories260K", ids, ids, context=256, tokens=51_200)
    assert task.metrics(task.build(), task.split("test"))["perplexity"] == pytest.approx(5.404, abs=1e-3)
    structure = analyze(task.build(), task.example_inputs())
    assert [g.kind for g in structure].count("kv_group") == 5
