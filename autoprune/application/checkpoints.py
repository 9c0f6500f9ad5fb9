"""Where a training is kept while it runs, so that the same call goes on inside it after a kill."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoprune.errors import InputError, one_line
from autoprune.files.whole import read_mapping, saying, write_whole

POINTER, WEIGHTS, STATE = "checkpoint.json", "weights.safetensors", "course.pt"
TURNS = ("checkpoint-a", "checkpoint-b")
"""The folders that hold the last state and the one before, in turns; the pointer says which counts."""


@dataclass(frozen=True)
class Saved:
    """What was kept: facts in plain values, tensors by kind and name, and a state of tensors and plain values."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A folder for one training at a time; `key` says which work it is of, and another key's is nobody's."""

    folder: Path
    key: str

    @staticmethod
    def beside(out: Path, key: str) -> Place:
        """That of the folder `out`: hidden, beside it, as `out` itself is written whole or not at all."""
        target = out.resolve()
        return Place(target.with_name(f".{target.name}.training"), key)

    def found(self) -> Saved | None:
        """What was kept last of this very work; None where there is nothing.

        Raises:
            InputError: the files are damaged.
        """
        pointer = self._pointer()
        if pointer.get("key") != self.key:
            return None
        held = self.folder / str(pointer["turn"])
        try:
            state = torch.load(held / STATE, map_location="cpu", weights_only=True)
            tensors: dict[str, dict[str, Tensor]] = {}
            for name, tensor in load_file(held / WEIGHTS).items():
                kind, _, own = name.partition("|")
                tensors.setdefault(kind, {})[own] = tensor
        except Exception as error:  # each of the two formats fails in ways of its own
            raise InputError(f"{held} is damaged ({one_line(error)}); remove {self.folder} to train anew") from error
        return Saved(pointer["facts"], tensors, state)

    def keep(self, saved: Saved) -> bool:
        """Keep this in place of what was there, whole or not at all; False where a state could not be read again.

        Raises:
            RunError: the disk is full.
        """
        pointer = self._pointer()
        if pointer.get("key") != self.key:
            self.clear()
            pointer = {}
        turn = TURNS[pointer.get("turn") == TURNS[0]]
        with saying(self.folder), self._emptied(turn) as folder:
            flat = {f"{kind}|{name}": t for kind, held in saved.tensors.items() for name, t in held.items()}
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in flat.items()}, folder / WEIGHTS)
            if not _written(saved.state, folder / STATE, not pointer):
                return False
        write_whole(self.folder / POINTER, json.dumps({"key": self.key, "turn": turn, "facts": saved.facts}))
        if pointer:
            shutil.rmtree(self.folder / str(pointer["turn"]), ignore_errors=True)
        return True

    def clear(self) -> None:
        """Nothing is left of it; what else lies in the folder stays."""
        (self.folder / POINTER).unlink(missing_ok=True)  # first, so that half a folder is nobody's state
        for turn in TURNS:
            shutil.rmtree(self.folder / turn, ignore_errors=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _pointer(self) -> Mapping[str, Any]:
        path = self.folder / POINTER
        return read_mapping(path) if path.is_file() else {}

    @contextmanager
    def _emptied(self, turn: str) -> Iterator[Path]:
        folder = self.folder / turn
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder


def _written(state: Mapping[str, Any], path: Path, look: bool) -> bool:
    """Write a state; False, said, where it holds more than tensors and plain values, which alone are ever loaded."""
    try:
        torch.save(dict(state), path)
        if look:
            torch.load(path, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        warnings.warn(
            f"the state of the training holds more than tensors and plain values ({one_line(error, 120)}), so it is "
            "not kept: a training that is killed begins anew",
            stacklevel=2,
        )
        return False
    return True
