"""A mirror that fails: said in one line before the search begins, survived while it runs."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli import run as command_line
from autoprune.errors import InputError
from autoprune.record import mirror
from autoprune.record.mirror import Mirror
from autoprune.record.storage import JOURNAL
from autoprune.run.folder_checks import MIRRORED
from tests.conftest import until
from tests.killable_compare import tiny_job
from tests.mirrors import BUCKET, at_server, folder, line, s3, server  # noqa: F401 - fixtures among them


def test_a_mirror_that_hangs_does_not_hold_up_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(mirror, "LAST_S", 0.2)
    monkeypatch.setattr(mirror._Store, "size", lambda self, name: gate.wait(30) and 0)
    with Mirror(folder, str(tmp_path / "shared"), MIRRORED) as ours:
        pass
    assert "is behind" in ours.news()
    gate.set()
    ours._thread.join(10)


def test_s3_that_stops_answering_is_said_and_caught_up_with(folder: Path, s3: Any, tmp_path: Path) -> None:
    with Mirror(folder, f"s3://{BUCKET}/stops", MIRRORED, every_s=0.02) as ours:
        until(lambda: ours._held > 0)
        endpoint = ours._store._fs
        held, endpoint._s3 = endpoint._s3, None
        endpoint.set_session, session = refuse, endpoint.set_session
        with (folder / JOURNAL).open("ab") as file:
            file.write(line(3))
        until(lambda: bool(ours.behind))
        endpoint._s3, endpoint.set_session = held, session
        until(lambda: not ours.behind)
    assert ours._store.read(JOURNAL) == (folder / JOURNAL).read_bytes()
    assert "works again" in ours.news()


async def refuse(*arguments: object, **options: object) -> None:
    raise ConnectionRefusedError(111, "Connection refused")


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str) -> str:
    """What the command line says to a job with this sync_to."""
    job = tmp_path / "job.yaml"
    data = {**tiny_job().plain(), "sync_to": url}
    job.write_text(json.dumps(data))
    started = time.monotonic()
    assert command_line(["search", str(job), "--out", str(tmp_path / "run")]) == 2
    assert time.monotonic() - started < 20
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run" / JOURNAL).exists()
    return said


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://a/b", r"sync_to nonsense://a/b cannot be used: .*Protocol not known: nonsense"),
        ("/proc/nowhere/run", r"sync_to /proc/nowhere/run cannot be used: No such file or directory"),
        ("job.yaml", r"job.yaml cannot be used: (File exists|Not a directory)"),
        ("run", r"sync_to .*run is the run folder itself"),
        ("  ", r"sync_to is empty"),
        ("s3://", r"sync_to s3:// names no bucket"),
    ],
)
def test_an_unusable_url_is_one_line(
    url: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if url.startswith("s3"):
        pytest.importorskip("s3fs", reason="s3fs is not installed")
        at_server(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert re.search(message, refused(tmp_path, capsys, url))


def test_s3_that_cannot_be_used_is_one_line(
    s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "The specified bucket does not exist" in refused(tmp_path, capsys, "s3://no-such-bucket/run")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes calls and never answers
        host, port = silent.getsockname()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setattr(mirror, "ANSWER_S", 1.0)
        assert "nothing answers" in refused(tmp_path, capsys, f"s3://{BUCKET}/run")
    monkeypatch.undo()
    at_server(monkeypatch, f"http://{host}:{port}", tmp_path)  # nothing listens there any more
    said = refused(tmp_path, capsys, f"s3://{BUCKET}/run")
    assert "Could not connect to the endpoint URL" in said
    assert "s3cr3t" not in said


def test_without_s3fs_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    assert "pip install 'autoprune[s3]'" in refused(tmp_path, capsys, f"s3://{BUCKET}/run")


def test_no_permission_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: object, name: str, content: object) -> None:
        raise PermissionError(13, "Permission denied", "/mnt/shared/autoprune-probe.part")

    monkeypatch.setattr(mirror._Store, "put", denied)
    with pytest.raises(InputError, match=r"cannot be used: Permission denied: /mnt/shared/autoprune-probe"):
        Mirror(folder, str(tmp_path / "shared"), MIRRORED)


def test_credentials_of_a_url_are_never_shown(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        Mirror(folder, "nonsense://hunter:p%40ssw0rd@host/run?signature=0123456789", MIRRORED)
    assert "nonsense://***@host/run" in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("hunter", "p%40ss", "p@ss", "0123456789"))
