"""The errors a user can meet, and the near-miss helper that makes them useful."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class AutopruneError(Exception):
    """Base of every error that autoprune raises on purpose; the command line prints it as one line."""


class InputError(AutopruneError):
    """The user's input is wrong: a job, a name, a file, a budget. Exit code 2."""


class RunError(AutopruneError):
    """The run failed, but what was computed is kept. Exit code 3."""


class PluginError(RunError):
    """A plug-in fails, or breaks its protocol: which one, what it did, what the protocol wants."""


class OutOfTimeError(RunError):
    """The time limit came before there was a front; the same command goes on."""


class NoPointError(RunError):
    """All went well, but nothing that was found keeps the constraints."""


def one_line(error: BaseException, most: int = 300) -> str:
    """Type and message of an exception in one line of at most `most` characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:most] if text else type(error).__name__


def root_line(error: BaseException, most: int = 300) -> str:
    """The first line of what a compiler or exporter stumbled over, below its own wrappings and colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:most]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Say what is allowed and which allowed name is nearest: the tail of an error message."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(names) or 'nothing'}"
