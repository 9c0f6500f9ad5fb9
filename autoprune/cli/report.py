"""`autoprune report`: the page of a run."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a search.")],
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Rebuild report.html of a run."""
    from autoprune.report import build_report

    path = build_report(run_dir)
    print(path)
    if open_:
        webbrowser.open(path.resolve().as_uri())
