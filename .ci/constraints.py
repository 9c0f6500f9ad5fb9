"""Writes constraints.txt, the tested set: what pip resolves today in a fresh environment, `python .ci/constraints.py`.

The versions are those of everything that `.[dev]` installs (the core, the exports and what the tests need), without
local labels such as `+cpu`: which build of a version is taken is left to whoever installs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# The tested set of versions, written by .ci/constraints.py and installed by `pip install -c constraints.txt`.
# Raise it: run the script, then .ci/run. The bounds that users get are those of pyproject.toml.
"""
NOT_OURS = ("autoprune", "pip", "setuptools", "wheel", "nvidia-", "triton", "cuda-")  # the last three come with a build


def resolve(folder: Path) -> list[str]:
    """The lines of `pip freeze` in a new environment at `folder` that holds `.[dev]`, nothing pinned."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "-e", f"{ROOT}[dev]"], check=True)
    return subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout.splitlines()


def pins(frozen: list[str]) -> list[str]:
    """One `name==version` for each package that is not ours, sorted."""
    lines = (line.split("+")[0] for line in frozen if "==" in line)
    return sorted((line for line in lines if not line.lower().startswith(NOT_OURS)), key=str.lower)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = HEADER + "\n".join(pins(resolve(Path(folder)))) + "\n"
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8")
