"""Folders and places to mirror them to, an S3-compatible server in this process among them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoprune.record.storage import JOURNAL

BUCKET = "pruning"


def line(i: int, machine: str = "a") -> bytes:
    return json.dumps({"trial": i, "machine": machine}).encode() + b"\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a journal of three trials and a database."""
    place = tmp_path / "run"
    (place / "database").mkdir(parents=True)
    (place / "database" / "0123456789abcdef.safetensors").write_bytes(b"levels")
    (place / "job.yaml").write_text("version: 1\n")
    (place / JOURNAL).write_bytes(line(0) + line(1) + line(2))
    (place / "policy.json").write_text("{}")
    return place


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3-compatible server in this process."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'autoprune[s3]'")
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'autoprune[dev]'")
    started = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A boto3 client; the environment leads s3fs to the server, which has one bucket."""
    import boto3

    at_server(monkeypatch, server, tmp_path)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    return client


def at_server(monkeypatch: pytest.MonkeyPatch, address: str, tmp_path: Path) -> None:
    """Fake credentials, and nothing of this machine's own."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {"ACCESS_KEY_ID": "AKIDFAKE", "SECRET_ACCESS_KEY": "s3cr3t-fake", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": address, "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(tmp_path / "none"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(params=["path", "file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://{BUCKET}/{tmp_path.name}/run"
    at = tmp_path / "shared disk" / "run"
    return {"path": str(at), "file": f"file://{at}", "memory": f"memory://{tmp_path.name}/run"}[request.param]
