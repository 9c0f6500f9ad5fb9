"""Tables of texts with a score or a label, as padded batches of tokens: read, cut into disjoint splits, tokenised."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import InputError, did_you_mean, one_line
from autoprune.tasks._arrays import cut, shares

Column = int | str
STEP = 8
"""Batches are as wide as a multiple of this."""
FEWEST = 30
"""Rows of a train file: 30 % of them calibrate, which takes 8 at least."""


@dataclass(frozen=True)
class Padded:
    """Texts as ({input_ids, attention_mask} int64 [rows, T], targets [samples]), a whole split of one width.

    That width is the longest text of the split, rounded up: batches of one shape join, so that a repair sees all its
    samples at once, and padding changes no result. `per_sample` rows in a row are a sample.
    """

    ids: Tensor
    lengths: Tensor
    targets: Tensor
    per_sample: int = 1
    size: int = 32

    def __len__(self) -> int:
        return -(-len(self.targets) // self.size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        places = torch.arange(self.ids.shape[1])
        for start in range(0, len(self.targets), self.size):
            targets = self.targets[start : start + self.size]
            rows = slice(start * self.per_sample, (start + len(targets)) * self.per_sample)
            mask = (places < self.lengths[rows, None]).long()
            yield {"input_ids": self.ids[rows].long(), "attention_mask": mask}, targets

    @property
    def samples(self) -> int:
        return len(self.targets)

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], targets: Tensor, pad: int, per_sample: int = 1) -> Padded:
        """From token ids, filled up with `pad`; a text without any has one that is nothing."""
        lengths = torch.tensor([max(1, len(row)) for row in tokens])
        width = STEP * math.ceil(int(lengths.max()) / STEP)
        ids = torch.full((len(tokens), width), pad, dtype=torch.int32)
        for row, known in zip(ids, tokens, strict=True):
            row[: len(known)] = torch.tensor(known, dtype=torch.int32)
        return Padded(ids, lengths, targets, per_sample)

    def rows_of(self, samples: np.ndarray) -> Padded:
        """Some samples of it, as wide as the longest of them needs."""
        index = torch.from_numpy(samples)
        rows = (index[:, None] * self.per_sample + torch.arange(self.per_sample)).flatten()
        lengths = self.lengths[rows]
        width = STEP * math.ceil(int(lengths.max()) / STEP)
        return Padded(self.ids[rows, :width], lengths, self.targets[index], self.per_sample, self.size)


def tokenised(tokenizer: Any, texts: Iterable[str], most: int) -> list[list[int]]:
    """The ids of each text with the tokenizer's own special tokens, at most `most` of them."""
    tokenizer.enable_truncation(most)
    try:  # one by one: a batch is tokenised by threads, of which a process that forks later warns
        return [tokenizer.encode(text).ids for text in texts]
    finally:
        tokenizer.no_truncation()


def in_splits(
    train: Padded, test: Padded, n_calibration: int | None, n_validation: int | None, seed: int
) -> dict[str, Padded]:
    """Calibration, validation and train, cut from `train`, disjoint and seeded; and test."""
    n = train.samples
    parts = cut(n, *shares(n, n_calibration, n_validation), seed)
    return {**{name: train.rows_of(samples) for name, samples in parts.items()}, "test": test}


@dataclass(frozen=True)
class Table:
    """The asked columns of a table's rows, with the line that each ends in."""

    path: Path
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]

    def column(self, i: int) -> tuple[str, ...]:
        """The values of the `i`-th column asked for."""
        return tuple(row[i] for row in self.rows)

    def numbers(self, i: int) -> list[float]:
        """The same as numbers; InputError that names the line for what is none."""
        for value, line in zip(self.column(i), self.lines, strict=True):
            if not _is_number(value):
                raise InputError(f"{self.path}, line {line}: {value!r:.60} is no number")
        return [float(value) for value in self.column(i)]


@dataclass(frozen=True)
class Tables:
    """Train and test; `said` is what a user ought to know of how they were read."""

    train: Table
    test: Table
    said: tuple[str, ...] = ()


def read_tables(train: Path, test: Path, columns: Sequence[Column], what: Sequence[str], last: str) -> Tables:
    """The `columns` of both files, as many as `what` names; .csv is separated by commas, all else by tabs.

    Columns by their names need a header. With positions the first line is one where its last column, a "score" or a
    "label" by `last`, is not like those below.

    Raises:
        InputError: a file, a column or a row is missing, or the files are one.
    """
    if len(columns) != len(what) or not all(type(c) in (int, str) for c in columns):
        shown = ", ".join(what)
        raise InputError(f"task.args.columns must be {len(what)} positions or names ({shown}), not {list(columns)}")
    if train.resolve() == test.resolve():
        raise InputError(f"task.args.train and task.args.test are the same file {train}")
    raw = {"train": _Raw.read(train, "train"), "test": _Raw.read(test, "test")}
    placed = {key: _places(raw, key, columns) for key in raw}
    tables = {key: _table(raw[key], placed[key][0], columns, last) for key in raw}
    if len(tables["train"].rows) < FEWEST:
        raise InputError(f"{train} has {len(tables['train'].rows)} rows; at least {FEWEST} are needed")
    if len(tables["test"].rows) < 2:
        raise InputError(f"{test} has {len(tables['test'].rows)} rows; at least 2 are needed")
    return Tables(tables["train"], tables["test"], tuple(said for _, said in placed.values() if said))


@dataclass(frozen=True)
class _Raw:
    """All rows of a file with the line that each ends in."""

    path: Path
    rows: list[list[str]]
    lines: list[int]

    @staticmethod
    def read(path: Path, key: str) -> _Raw:
        comma = path.suffix.lower() == ".csv"
        form: dict[str, Any] = {"delimiter": ","} if comma else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        rows, lines = [], []
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, **form)
                for row in reader:
                    if row:
                        rows.append(row)
                        lines.append(reader.line_num)
        except FileNotFoundError as error:
            raise InputError(f"task.args.{key}: no file {path}") from error
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"task.args.{key}: {path} is no table of text: {one_line(error, 120)}") from error
        if not rows:
            raise InputError(f"task.args.{key}: {path} is empty")
        return _Raw(path, rows, lines)


def _places(raw: dict[str, _Raw], key: str, columns: Sequence[Column]) -> tuple[list[int], str]:
    """Where the columns are in a file, and what to say of it.

    A name that one file's header lacks is looked for in the other's, if both have as many columns.
    """
    mine, other = raw[key], raw["test" if key == "train" else "train"]
    found, said = [], ""
    for column in columns:
        if isinstance(column, int):
            if not 0 <= column < len(mine.rows[0]):
                shown = f"the positions 0 to {len(mine.rows[0]) - 1}"
                raise InputError(f"task.args.columns: {mine.path} has no column {column}; it has {shown}")
            found.append(column)
        elif column in mine.rows[0]:
            found.append(mine.rows[0].index(column))
        elif column in other.rows[0] and len(other.rows[0]) == len(mine.rows[0]):
            found.append(other.rows[0].index(column))
            said = f"{mine.path.name} has no column {column!r}; {mine.rows[0][found[-1]]!r} in the same place is taken"
        else:
            raise InputError(
                f"task.args.columns: {mine.path} has no column {column!r}; {did_you_mean(column, mine.rows[0][:20])}"
            )
    if len(set(found)) < len(found):
        raise InputError(f"task.args.columns: {list(columns)} name a column of {mine.path} twice")
    return found, said


def _table(raw: _Raw, places: Sequence[int], columns: Sequence[Column], last: str) -> Table:
    most = max(places)
    for row, line in zip(raw.rows, raw.lines, strict=True):
        if len(row) <= most:
            raise InputError(f"{raw.path}, line {line}: it has {len(row)} columns; column {most} is asked for")
    rows = tuple(tuple(row[i] for i in places) for row in raw.rows)
    named = any(isinstance(column, str) for column in columns)
    first = 1 if named or _is_header(rows, last) else 0
    return Table(raw.path, rows[first:], tuple(raw.lines[first:]))


def _is_header(rows: Sequence[Sequence[str]], last: str) -> bool:
    """Whether the first line is one: its score is no number, its label comes nowhere else."""
    above, below = rows[0][-1], [row[-1] for row in rows[1:]]
    if last == "score" or all(map(_is_number, below)):
        return not _is_number(above)
    return above not in below


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
