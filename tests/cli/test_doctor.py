"""`autoprune doctor`: what is here, from metadata and the system; nothing that is broken makes it fail."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import autoprune
from autoprune.cli import extras, run
from autoprune.cli.doctor import FLAGS, checked
from autoprune.evaluator.precision import choose_precision
from autoprune.files import machine
from autoprune.files.job_parts import ExecutorPart
from tests.conftest import importing_alike

METADATA = """Metadata-Version: 2.4
Name: {name}
Version: {version}
"""
OWN = """Provides-Extra: there
Provides-Extra: newer
Provides-Extra: absent
Provides-Extra: deep
Provides-Extra: all
Requires-Dist: typer>=0.1
Requires-Dist: optuna>=1; extra == "there"
Requires-Dist: nothing-like-this; python_version < "3" and extra == "there"
Requires-Dist: optuna>=999; extra == "newer"
Requires-Dist: nothing-like-this>=2; extra == "absent"
Requires-Dist: outer[inner]; extra == "deep"
Requires-Dist: autoprune[there,newer]; extra == "all"
"""


def distribution(folder: Path, name: str, version: str, more: str = "") -> None:
    """Metadata of a package as pip leaves them."""
    (folder / f"{name}-{version}.dist-info").mkdir()
    text = METADATA.format(name=name, version=version) + more
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text, encoding="utf-8")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which metadata are found before those of this installation."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["doctor", "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_the_facts_are_those_that_a_search_goes_by(capsys: pytest.CaptureFixture[str]) -> None:
    facts = told(capsys)
    assert facts["versions"]["autoprune"] == autoprune.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["optuna"] == optuna.__version__
    assert facts["cores"] == machine.usable_cores()
    assert facts["memory"]["bytes"] == machine.machine_memory()
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["auto"]["workers"] == ExecutorPart().n_workers
    found = facts["auto"]["precision"]
    device = torch.device(found["device"])
    assert found["models"] == choose_precision("auto", device, 1e12)
    assert found["small_models"] == choose_precision("auto", device, found["small_macs"] - 1)


def test_people_read_it_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    words = ("versions", "cores", "memory", "GPU", "Ray cluster", "workers: auto", "precision: auto", "extras", "onnx")
    assert [word for word in words if not any(line.startswith(word) for line in text.splitlines())] == []


def test_an_extra_is_installed_where_all_its_packages_are(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distribution(packages, "autoprune", "9.9", OWN)
    distribution(packages, "outer", "1.0", 'Provides-Extra: inner\nRequires-Dist: inmost>=3; extra == "inner"\n')
    distribution(packages, "inmost", "2.0")
    found = {extra["name"]: extra for extra in extras.extras()}
    lacking = {name: extra["lacking"] for name, extra in found.items()}
    assert lacking == {
        "there": [],
        "newer": ["optuna>=999"],
        "absent": ["nothing-like-this>=2"],
        "deep": ["inmost>=3"],
        "all": ["optuna>=999"],
    }
    assert {name for name, extra in found.items() if extra["installed"]} == {"there"}
    assert run(["doctor"]) == 0
    assert "lacks inmost>=3; pip install 'autoprune[deep]'" in capsys.readouterr().out


def test_a_checkout_says_itself_which_extras_there_are(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(packages, "autoprune", "9.9", "Provides-Extra: odd\nRequires-Dist: ???\n")
    assert {"onnx", "cluster", "timm", "dev"} <= {extra["name"] for extra in extras.extras()}
    monkeypatch.setattr(extras, "PROJECT", packages / "nowhere.toml")
    assert extras.extras() == []


def test_damaged_metadata_are_told_and_no_reason_to_fail(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distribution(packages, "autoprune", "9.9", 'Provides-Extra: odd\nRequires-Dist: odd[more]; extra == "odd"\n')
    distribution(packages, "odd", "not a version", "Provides-Extra: more\nRequires-Dist: ???\n")
    (packages / "ray-9.dist-info").mkdir()
    facts = told(capsys)
    (odd,) = facts["extras"]
    assert not odd["installed"]
    assert odd["lacking"]
    assert facts["versions"]["ray"] is None


def test_a_torch_that_does_not_load_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libgomp.so.1: cannot open')", encoding="utf-8")
    env = importing_alike()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    command = [sys.executable, "-m", "autoprune.cli", "doctor", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["gpus"] is None
    assert "libgomp" in facts["gpus_error"]
    assert "libgomp" in facts["auto"]["precision_error"]
    assert facts["cores"] == machine.usable_cores()


def test_it_takes_little_more_than_torch_does() -> None:
    def processor_s(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], env=importing_alike(), capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert processor_s("-m", "autoprune.cli", "doctor") < processor_s("-c", "import torch") + 1.5


def test_the_word_of_a_ray_cluster_is_repeated_and_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert checked()["ray_cluster"] is None
    (tmp_path / "ray").mkdir()
    word = tmp_path / "ray" / "ray_current_cluster"
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # one that would let a caller wait
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        word.write_text(f"{address}\n", encoding="utf-8")
        began = time.monotonic()
        assert checked()["ray_cluster"] == {"address": address, "from": str(word)}
        assert time.monotonic() - began < 5.0
        deaf.settimeout(0.05)
        with pytest.raises(TimeoutError):
            deaf.accept()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert checked()["ray_cluster"] == {"address": "head:6379", "from": "RAY_ADDRESS"}
    assert run(["doctor"]) == 0
    assert "head:6379 (from RAY_ADDRESS; not asked whether it answers)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("flags\t: fpu avx avx2 avx512f avx_vnni amx_tile\n", {"AVX", "AVX2", "AVX512", "VNNI", "AMX"}),
        ("flags\t: fpu sse\n", set()),
        ("model name: unknown\n", None),
    ],
)
def test_flags_of_the_processor(
    text: str, there: set[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    flags = checked()["flags"]
    assert (flags is None) == (there is None)
    if flags is not None:
        assert {*flags} == {*FLAGS}
        assert {name for name, is_there in flags.items() if is_there} == there
