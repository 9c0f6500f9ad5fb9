"""Writes constraints.txt, the tested set: what pip resolves today for a fresh environment, `python .ci/constraints.py`.

The versions are those of everything that `.[dev]` installs (the core, the exports and what the tests need), without
local labels such as `+cpu`: which build of a version is taken is left to whoever installs. Nothing is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# The tested set of versions, written by .ci/constraints.py and installed by `pip install -c constraints.txt`.
# Raise it: run the script, then .ci/run. The bounds that users get are those of pyproject.toml.
"""
NOT_OURS = ("autoprune", "pip", "setuptools", "wheel", "nvidia-", "triton", "cuda-")  # the last three come with a build


def resolve(report: Path) -> dict[str, str]:
    """The version of each package that `.[dev]` would bring into an empty environment, by name; nothing pinned."""
    resolving = ["install", "-q", "--dry-run", "--ignore-installed", "--report", str(report), f"{ROOT}[dev]"]
    subprocess.run([sys.executable, "-m", "pip", *resolving], check=True)
    found = (entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"])
    return {package["name"]: package["version"] for package in found}


def pins(versions: dict[str, str]) -> list[str]:
    """One `name==version` for each package that is not ours, sorted."""
    lines = (f"{name}=={version.split('+')[0]}" for name, version in versions.items())
    return sorted((line for line in lines if not line.lower().startswith(NOT_OURS)), key=str.lower)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = HEADER + "\n".join(pins(resolve(Path(folder) / "report.json"))) + "\n"
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8")
