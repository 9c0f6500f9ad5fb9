"""A training is kept whole or not at all, for the work that it is of, and read without running anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprune.application import checkpoints
from autoprune.application.checkpoints import POINTER, STATE, WEIGHTS, Place, Saved
from autoprune.errors import InputError


def saved(number: float, state: Any = None) -> Saved:
    tensors = {"model": {"a.weight": torch.full((2, 2), number)}, "best": {"a.weight": torch.zeros(2, 2)}}
    return Saved({"part": int(number), "history": [[0, float("inf")], [3, 0.1]]}, tensors, state or {"done": number})


def test_the_last_one_counts_and_comes_back_as_it_was(tmp_path: Path) -> None:
    place = Place(tmp_path / ".small.training", "this")
    assert place.found() is None
    for number in (1.0, 2.0, 3.0):
        assert place.keep(saved(number))
        found = place.found()
        assert found is not None
        assert found.facts == saved(number).facts
        assert found.state == {"done": number}
        assert torch.equal(found.tensors["model"]["a.weight"], torch.full((2, 2), number))
        assert set(found.tensors) == {"model", "best"}
        assert len([p for p in place.folder.iterdir() if p.is_dir()]) == 1
    assert Place(place.folder, "other").found() is None
    Place(place.folder, "other").keep(saved(9.0))
    assert place.found() is None
    place.clear()
    assert not place.folder.exists()


@pytest.mark.parametrize("when", [WEIGHTS, STATE, POINTER])
def test_a_kill_while_it_is_written_leaves_the_one_before(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "kept", "this")
    place.keep(saved(1.0))

    class KilledError(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    name = {WEIGHTS: "save_file", STATE: "torch.save", POINTER: "write_whole"}[when]
    monkeypatch.setattr(f"{checkpoints.__name__}.{name}", killed)
    with pytest.raises(KilledError):
        place.keep(saved(2.0))
    monkeypatch.undo()
    found = place.found()
    assert found is not None
    assert found.state == {"done": 1.0}
    place.keep(saved(3.0))
    again = place.found()
    assert again is not None
    assert again.state == {"done": 3.0}


def test_a_state_of_more_than_plain_values_is_not_kept_and_said_once(tmp_path: Path) -> None:
    place = Place(tmp_path / "kept", "this")
    with pytest.warns(UserWarning, match=r"holds more than tensors and plain values .*begins anew"):
        assert place.keep(saved(1.0, {"path": Path("x")})) is False
    assert place.found() is None


def test_damaged_files_are_one_line_that_says_what_to_remove(tmp_path: Path) -> None:
    place = Place(tmp_path / "kept", "this")
    place.keep(saved(1.0))
    turn = json.loads((place.folder / POINTER).read_text())["turn"]
    (place.folder / turn / WEIGHTS).write_bytes(b"half")
    with pytest.raises(InputError, match=r"is damaged \(.*\); remove .*kept to train anew") as caught:
        place.found()
    assert "\n" not in str(caught.value)


def test_it_lies_hidden_beside_the_folder_of_the_result(tmp_path: Path) -> None:
    assert Place.beside(tmp_path / "small", "k").folder == tmp_path.resolve() / ".small.training"


def test_a_state_of_more_than_plain_values_is_not_kept_and_that_is_said(tmp_path: Path) -> None:
    place = Place(tmp_path / "kept", "this")
    for state in ({"made": lambda: 1}, {"made": Path("a")}):
        with pytest.warns(UserWarning, match=r"more than tensors and plain values .* begins anew"):
            assert not place.keep(saved(1.0, state))
        assert place.found() is None
    place.keep(saved(2.0))
    with pytest.warns(UserWarning, match="more than tensors and plain values"):
        assert not place.keep(saved(3.0, {"made": lambda: 1}))
    found = place.found()
    assert found is not None
    assert found.state == {"done": 2.0}
