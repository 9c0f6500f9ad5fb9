"""Applied folders: `save` and `load` are a pair; a folder is replaced whole or refused, nothing half-written stays."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import autoprune
from autoprune.errors import InputError, RunError
from autoprune.files.policy_file import load_front
from autoprune.files.whole import whole, whole_folder
from autoprune.front import Point
from autoprune.tracing.fingerprint import weights_fingerprint
from tests.golden_models import RandomPictures, mixed

GOLDENS = Path(__file__).parents[1] / "goldens" / "0.1.0"
FILES = {"README.md", "model.safetensors", "policy.json", "apply.json"}


@pytest.fixture(scope="module")
def task() -> RandomPictures:
    return RandomPictures("mixed")


@pytest.fixture(scope="module")
def point() -> Point:
    return load_front(GOLDENS / "mixed.json")[0]


@pytest.fixture(scope="module")
def small(point: Point, task: RandomPictures) -> nn.Module:
    return autoprune.apply(point, task.build(), task.example_inputs(), task=task)


@pytest.fixture
def saved(small: nn.Module, tmp_path: Path) -> Path:
    autoprune.save(small, tmp_path / "small")
    return tmp_path / "small"


def _same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return type(a) is type(b) and all(torch.equal(mine[k], v) for k, v in theirs.items()) and len(mine) == len(theirs)


def test_what_is_saved_is_what_is_loaded(small: nn.Module, saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == FILES
    again = autoprune.load(saved, factory=mixed)
    assert _same(again, small)
    assert not again.training
    assert _same(autoprune.load(saved, factory="tests.golden_models:mixed"), small)
    autoprune.save(again, saved)
    assert _same(autoprune.load(saved, factory=lambda: RandomPictures("mixed")), small)


def test_a_users_factory_is_imported_only_where_it_is_passed(saved: Path) -> None:
    with pytest.raises(InputError, match="pass the factory that makes the dense model"):
        autoprune.load(saved)
    for named in ({"factory": "tests.golden_models:mixed"}, {"name": "images", "args": {"model": "tests.x:y"}}):
        facts = json.loads((saved / "apply.json").read_text())
        (saved / "apply.json").write_text(json.dumps({**facts, "task": named}))
        with pytest.raises(InputError, match="pass the factory that makes the dense model"):
            autoprune.load(saved)


def test_a_built_in_model_is_built_anew_from_what_the_folder_says(tmp_path: Path) -> None:
    front, resnet = load_front(GOLDENS / "resnet20.json"), RandomPictures("resnet20")
    with pytest.warns(UserWarning, match="only slices"):
        small = autoprune.apply(front[0], resnet.build(), resnet.example_inputs())
    autoprune.save(small, tmp_path / "small")
    facts = json.loads((tmp_path / "small" / "apply.json").read_text())
    task = {"name": "images", "args": {"model": "autoprune.tasks:resnet20", "weights": "gone.safetensors"}}
    (tmp_path / "small" / "apply.json").write_text(json.dumps({**facts, "task": task}))
    state = torch.get_rng_state()
    assert _same(autoprune.load(tmp_path / "small"), small)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_trained_further_is_saved_as_it_is_and_loses_the_figures_that_were_true_before(
    small: nn.Module, tmp_path: Path
) -> None:
    trained = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    with torch.no_grad():
        trained.head.bias.add_(1.0)
    autoprune.save(trained, tmp_path / "small")
    assert _same(autoprune.load(tmp_path / "small", factory=mixed), trained)
    facts = json.loads((tmp_path / "small" / "apply.json").read_text())
    assert facts["validation"] is None
    assert facts["recipe"] == {"recipe": "your own"}


def test_a_model_from_elsewhere_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not come from autoprune.apply"):
        autoprune.save(mixed(), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_another_dense_model_is_refused_with_the_layer_named(saved: Path) -> None:
    def other() -> nn.Module:
        model = mixed()
        model.hidden = nn.Linear(256, 24)
        return model

    with pytest.raises(InputError, match="hidden: policy says 20 wide, model has 24"):
        autoprune.load(saved, factory=other)
    with pytest.raises(InputError, match=r"returned a int, not a torch.nn.Module"):
        autoprune.load(saved, factory=lambda: 3)


def test_a_folder_without_an_applied_model_is_refused_in_one_line(
    saved: Path, task: RandomPictures, tmp_path: Path
) -> None:
    for gone, message in (("model.safetensors", "folder of a search"), ("policy.json", "makes one")):
        shutil.copytree(saved, tmp_path / gone)
        (tmp_path / gone / gone).unlink()
        with pytest.raises(InputError, match=message):
            autoprune.load_applied(tmp_path / gone, task.build(), task.example_inputs())
    with pytest.raises(InputError, match="no such folder"):
        autoprune.load_applied(tmp_path / "nowhere", task.build(), task.example_inputs())
    shutil.copy(GOLDENS / "mixed.json", saved / "policy.json")
    with pytest.raises(InputError, match="an applied model has one"):
        autoprune.load(saved, factory=mixed)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_damaged_facts_and_weights_are_one_line(damage: bytes, saved: Path) -> None:
    kept = (saved / "apply.json").read_bytes()
    (saved / "apply.json").write_bytes(damage)
    with pytest.raises(InputError, match=r"apply.json is damaged"):
        autoprune.load(saved, factory=mixed)
    (saved / "apply.json").write_bytes(kept)
    (saved / "model.safetensors").write_bytes(damage)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        autoprune.load(saved, factory=mixed)


def test_a_folder_in_use_is_replaced_whole(small: nn.Module, saved: Path) -> None:
    (saved / "model.pt2").write_text("an older export")
    (saved / "report.json").write_text("{}")
    autoprune.save(small, saved)
    assert {p.name for p in saved.iterdir()} == FILES
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_folder_with_a_format_of_the_users_own_is_replaced_as_well(small: nn.Module, saved: Path) -> None:
    facts = json.loads((saved / "apply.json").read_text())
    facts["files"] = [*facts["files"], "elsewhere/model.gguf"]
    (saved / "apply.json").write_text(json.dumps(facts))
    (saved / "model.gguf").write_text("an older export")
    (saved / "model.gguf.data").write_text("what belongs to it")
    autoprune.save(small, saved)
    assert {p.name for p in saved.iterdir()} == FILES


@pytest.mark.parametrize("foreign", ["notes.txt", "study.journal", "front.csv"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    foreign: str, small: nn.Module, saved: Path
) -> None:
    (saved / foreign).write_text("mine")
    with pytest.raises(InputError, match="choose"):
        autoprune.save(small, saved)
    assert (saved / foreign).read_text() == "mine"
    with pytest.raises(InputError, match="is a file"):
        autoprune.save(small, saved / foreign)


def test_an_empty_folder_and_a_link_to_one_are_taken(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    autoprune.save(small, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert {p.name for p in (tmp_path / "real").iterdir()} == FILES


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_interrupted_nothing_half_written_is_left_in_place(error: BaseException, saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def half(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(type(error)), whole_folder(saved) as draft:
        half(draft / "model.safetensors")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    with pytest.raises(type(error)), whole(saved / "policy.json") as file:
        half(file)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_line_whoever_writes(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*: .*No space left on device"), whole(tmp_path / "x"):
        raise error
    with pytest.raises(RunError, match=r"cannot write .*: .*No space left on device"), whole_folder(tmp_path / "y"):
        raise error
    assert not list(tmp_path.iterdir())


def test_files_get_the_users_umask(small: nn.Module, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        autoprune.save(small, tmp_path / "small")
        with whole(tmp_path / "one") as draft:
            draft.touch(0o600)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (*(tmp_path / "small").iterdir(), tmp_path / "one")}
    assert set(modes.values()) == {0o640}
    assert (tmp_path / "small").stat().st_mode & 0o777 == 0o750


def test_a_model_that_was_pruned_twice_loads_by_way_of_the_first_folder(
    small: nn.Module, saved: Path, task: RandomPictures, tmp_path: Path
) -> None:
    group = next(g for g in autoprune.analyze(small, task.example_inputs()) if g.name == "hidden")
    keep = {"hidden": tuple(range(group.width - 3))}
    first, count = load_front(saved / "policy.json")[0], sum(p.numel() for p in small.parameters())
    own = {"groups": (group,), "order": {}, "costs": {"macs": 2, "params": count}}
    base = replace(first.base, weights_fingerprint=weights_fingerprint(small), **own)
    policy = autoprune.Policy.of({"hidden": group.width - 3})
    again = replace(first, id="q00", base=base, keep=keep, policy=policy, costs={"macs": 1, "params": 1})
    with pytest.warns(UserWarning, match="only slices"):
        smaller = autoprune.apply(again, small, task.example_inputs())
    autoprune.save(smaller, tmp_path / "second")
    assert _same(autoprune.load(tmp_path / "second", factory=lambda: autoprune.load(saved, factory=mixed)), smaller)
    assert small.autoprune_origin["policy"] != smaller.autoprune_origin["policy"]
