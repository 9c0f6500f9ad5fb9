"""The command line, assembled of its verbs: a file each. The only place that prints or exits."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli import apply, compare, doctor, front, inspect, report, search
from autoprune.cli.interrupts import INTERRUPTED, TooEarlyError
from autoprune.errors import AutopruneError, InputError
from autoprune.version import __version__

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 wrong input, 3 the run failed, 130 interrupted and resumable."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    sys.stdout.flush()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """The exit code of the command line for `arguments`; every error is one line on stderr, never a traceback."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # so that a job's "module:function" finds modules beside the user
    command = typer.main.get_command(app)
    aside = contextlib.redirect_stdout(sys.stderr) if "--json" in arguments else contextlib.nullcontext()
    try:
        with aside:  # whatever a user's model prints, stdout is one document
            code = command.main(list(arguments) or ["--help"], prog_name="autoprune", standalone_mode=False)
    except KeyboardInterrupt:
        return _say(INTERRUPTED, 130)
    except SystemExit as leaving:  # typer turns an interrupt into this
        return _say(INTERRUPTED, 130) if leaving.code == 130 else _exit_code(leaving.code)
    except TooEarlyError as error:
        return _say(str(error), 130)
    except AutopruneError as error:
        if error.__cause__ is not None and os.environ.get("AUTOPRUNE_DEBUG"):  # a plug-in's author looks for the line
            raise
        return _say(str(error), 2 if isinstance(error, InputError) else 3)
    except Exception as error:
        if os.environ.get("AUTOPRUNE_DEBUG"):
            raise
        return _say(*_explain(error))
    if code == 130:  # or into this, by version
        return _say(INTERRUPTED, 130)
    return _exit_code(code)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"autoprune {__version__}")
        raise typer.Exit


@app.callback()
def autoprune(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Search how much each layer of a neural network should be pruned."""


for verb in (inspect.inspect, search.search, compare.compare, apply.apply, front.front, report.report, doctor.doctor):
    app.command()(verb)  # the help lists them in this order


def _explain(error: Exception) -> tuple[str, int]:
    """A message and exit code for an exception that is not ours."""
    if hasattr(error, "format_message"):  # the parser's usage errors, whichever click typer comes with
        return str(error.format_message()), 2
    if type(error).__name__ == "Abort":
        return INTERRUPTED, 130
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"the system refuses a file{where}: {error.strerror}; what was computed is kept", 3
    text = " ".join(str(error).split()) or "no message"
    return f"unexpected {type(error).__name__}: {text} (AUTOPRUNE_DEBUG=1 shows where)", 3


def _exit_code(code: object) -> int:
    if isinstance(code, dict):
        print(json.dumps(code, indent=1, default=str))
    return code if isinstance(code, int) else 0


def _say(message: str, code: int) -> int:
    print(f"autoprune: {' '.join(message.split())}", file=sys.stderr)
    return code
