"""A record in a database is the record in the journal: replay, refusals, outages; and the dashboard reads both."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoprune.application.delivery import apply_file
from autoprune.cli import run as command_line
from autoprune.comparison.checks import at_budgets
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.inline import Inline
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.record import sql
from autoprune.record.record import Record, Stage
from autoprune.record.sql import Database, masked
from autoprune.record.storage import JOURNAL
from autoprune.report import build_report
from autoprune.report.read import read_trials
from autoprune.run.loop import search_loop
from autoprune.run.run import Run, search
from autoprune.samplers import build_sampler
from tests import killable_run
from tests.conftest import importing_alike
from tests.killable_compare import tiny_job
from tests.killable_run import STRUCTURE
from tests.postgres import PASSWORD, Server, free_port, missing
from tests.synthetic import Asks, Hills, MakeHills, make_problem

N_TRIALS = 12
ASK = Ask(Policy.dense(STRUCTURE), "refit")
NO_DASHBOARD = "optuna-dashboard is not installed (pip install 'autoprune[dashboard]')"


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed (pip install 'autoprune[postgres]')")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("TEST_PGPASSWORD", PASSWORD)
    return shared_server


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


def recorded(folder: Path, storage: str | None = None) -> dict[tuple[Stage, int], Evaluation]:
    """All that the record holds, without the wall time, which no two runs share."""
    with Record(folder, STRUCTURE, ("macs",), storage=storage) as record:
        return {key: replace(e, seconds=0.0) for key, e in record.evaluations.items()}


def hills(record: Record, n: int) -> Iterator[Evaluation]:
    sampler = build_sampler("random", make_problem(STRUCTURE), np.random.default_rng(0), {})
    return search_loop(record, Inline(MakeHills(STRUCTURE)), sampler, Asks(n), window=2)


def start(folder: Path, storage: str) -> subprocess.Popen[bytes]:
    arguments = [str(folder), str(N_TRIALS), "0", str(folder.parent / "log"), storage]
    return subprocess.Popen([sys.executable, killable_run.__file__, *arguments], env=importing_alike())


def test_a_run_killed_on_one_machine_ends_on_another_like_one_in_a_journal(server: Server, tmp_path: Path) -> None:
    evaluate = MakeHills(STRUCTURE, fail_share=0.05)
    expected = killable_run.run(tmp_path / "whole", N_TRIALS, Inline(evaluate))
    whole = killable_run.run(tmp_path / "whole-too", N_TRIALS, Inline(evaluate), server.url())
    assert recorded(tmp_path / "whole-too", server.url()) == recorded(tmp_path / "whole")
    folder = tmp_path / "one" / "killed"
    folder.parent.mkdir()
    process, at = start(folder, server.url()), random.Random(0).randint(1, 6)
    while process.poll() is None and server.count("autoprune/killed") < at:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed = killable_run.run(tmp_path / "two" / "killed", N_TRIALS, Inline(evaluate), server.url())
    assert recorded(tmp_path / "two" / "killed", server.url()) == recorded(tmp_path / "whole")
    assert server.count("autoprune/killed") == len(recorded(tmp_path / "whole")), "nothing was recorded twice"
    fronts = [[replace(e, seconds=0.0) for e in front] for front in (expected, whole, killed)]
    assert fronts[0] == fronts[1] == fronts[2]
    assert not (tmp_path / "two" / "killed" / JOURNAL).exists()


def test_what_a_database_gives_back_is_the_same_to_the_last_bit(sqlite: str, tmp_path: Path) -> None:
    with Record(tmp_path / "run", STRUCTURE, ("macs",), storage=sqlite) as record:
        list(hills(record, 4))
        assert record.horizon(7) == record.horizon(9) == 7
        before, labels, versions = record.evaluations, record.labels, record.versions
    with Record(tmp_path / "run", STRUCTURE, ("macs",), storage=sqlite) as record:
        assert (record.evaluations, record.labels, record.versions) == (before, labels, versions)
        assert record.horizon(9) == 7
        assert record.study.metric_names == ["loss", "macs"]
    with pytest.raises(InputError, match="records loss, macs, this job has loss, params"):
        Record(tmp_path / "run", STRUCTURE, ("params",), storage=sqlite)


def test_a_record_of_another_model_is_refused(sqlite: str, tmp_path: Path) -> None:
    Record(tmp_path / "run", STRUCTURE, ("macs",), identity={"weights": "a"}, storage=sqlite).close()
    with pytest.raises(InputError, match="records a search with other weights"):
        Record(tmp_path / "run", STRUCTURE, ("macs",), identity={"weights": "b"}, storage=sqlite)


@pytest.fixture(scope="module")
def tiny_run(shared_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_PGPASSWORD", PASSWORD)
        folder = tmp_path_factory.mktemp("machine") / "tiny"
        yield search(tiny_job(storage=shared_server.url()), out=folder).finish()


def test_a_whole_search_leaves_its_study_in_the_database_and_its_report(
    server: Server, tiny_run: Run, tmp_path: Path
) -> None:
    names = {p.name for p in tiny_run.path.iterdir()}
    assert {"job.yaml", "policy.json", "front.csv", "report.html", "log.jsonl"} <= names
    assert JOURNAL not in names
    assert len(tiny_run.study.trials) == server.count("autoprune/tiny") > 8
    assert len(read_trials(tiny_run.path / JOURNAL, server.url())) == server.count("autoprune/tiny")
    assert "recorded" in build_report(tiny_run.path).read_text()
    with pytest.raises(InputError, match="which apply would overwrite"):
        apply_file(tmp_path / "policy.json", tiny_job(), "knee", tiny_run.path)
    for path in tiny_run.path.iterdir():
        assert path.is_dir() or PASSWORD not in path.read_text()


def test_the_same_job_on_a_new_machine_replays_and_another_one_is_refused(
    server: Server, tiny_run: Run, tmp_path: Path
) -> None:
    n_trials = server.count("autoprune/tiny")
    again = search(tiny_job(storage=server.url(), executor={"retries": 1}), out=tmp_path / "tiny").finish()
    assert [p.policy for p in again.front] == [p.policy for p in tiny_run.front]
    assert server.count("autoprune/tiny") == n_trials
    other = tiny_job(storage=server.url(), criterion="l1_norm", search={"seed": 5})
    with pytest.raises(InputError, match=r"study autoprune/tiny in .*another job: criterion, search\.seed differ"):
        search(other, out=tmp_path / "third" / "tiny")
    with pytest.raises(InputError, match=r"another job: search\.trials differ"):
        search(tiny_job(storage=server.url(), search={"trials": 7}), out=tmp_path / "third" / "tiny")
    with pytest.raises(InputError, match="another job: storage differ"):
        search(tiny_job(), out=tiny_run.path)


def test_fresh_forgets_this_study_and_no_other(sqlite: str, tmp_path: Path) -> None:
    for name in ("mine", "yours"):
        with Record(tmp_path / name, STRUCTURE, ("macs",), storage=sqlite) as record:
            record.add(0, Hills(STRUCTURE)(ASK), "search")
    run = search(tiny_job(storage=sqlite), out=tmp_path / "mine", fresh=True)
    assert run.study is None
    assert len(recorded(tmp_path / "yours", sqlite)) == 1


def test_two_machines_do_not_write_to_one_study(server: Server, tmp_path: Path) -> None:
    first = Record(tmp_path / "one" / "shared", STRUCTURE, ("macs",), storage=server.url())
    with pytest.raises(InputError, match=rf"autoprune/shared in .* is in use by autoprune process {os.getpid()} on "):
        Record(tmp_path / "two" / "shared", STRUCTURE, ("macs",), storage=server.url())
    with pytest.raises(InputError, match="is in use by"):
        search(tiny_job(storage=server.url()), out=tmp_path / "three" / "shared", fresh=True)
    Record(tmp_path / "two" / "another", STRUCTURE, ("macs",), storage=server.url()).close()
    first.close()
    Record(tmp_path / "two" / "shared", STRUCTURE, ("macs",), storage=server.url()).close()


def test_a_server_lost_in_the_middle_ends_the_run_and_the_same_run_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Record(tmp_path / "whole", STRUCTURE, ("macs",)) as record:
        whole = [replace(e, seconds=0.0) for e in hills(record, 10)]
    monkeypatch.setattr(sql, "RETRY_S", 0.5)
    try:
        with Record(tmp_path / "lost", STRUCTURE, ("macs",), storage=server.url()) as record:
            told = hills(record, 10)
            first = [replace(next(told), seconds=0.0) for _ in range(4)]
            server.stop()
            with pytest.raises(RunError, match="everything finished before is kept, and the same command goes on"):
                list(told)
    finally:
        server.start()
    kept = recorded(tmp_path / "lost", server.url())
    assert first == whole[: len(first)] == [kept["search", i] for i in range(len(first))]
    with Record(tmp_path / "lost", STRUCTURE, ("macs",), storage=server.url()) as record:
        assert [replace(e, seconds=0.0) for e in hills(record, 10)] == whole


def test_a_server_that_is_soon_back_does_not_end_the_run(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Record(tmp_path / "failover", STRUCTURE, ("macs",), storage=server.url()) as record:
        told = hills(record, 6)
        next(told)
        server.stop()
        server.start()
        assert len(list(told)) == 5
        with pytest.raises(InputError, match="is in use by"):  # the lock came back with the connection
            Record(tmp_path / "other" / "failover", STRUCTURE, ("macs",), storage=server.url())
    assert len(recorded(tmp_path / "failover", server.url())) == 6
    assert "Traceback" not in capfd.readouterr().err


WRONG = {
    "postgresql://tester:wrong@127.0.0.1:{port}/postgres": "password authentication failed",
    "postgresql://tester:{password}@127.0.0.1:{port}/nowhere": 'database "nowhere" does not exist',
    "postgresql://tester:{password}@127.0.0.1:{port}/postgres?sslmod=on": "invalid connection option",
}
WRONG_ANYWHERE = {
    "postgresql://tester:secret@127.0.0.1:1/postgres": "Connection refused",
    "postgresql://tester:secret@host.invalid/postgres": "could not translate host name",
    "postgresql+asyncpg://tester:secret@127.0.0.1/postgres": r"pip install 'autoprune\[postgres\]'",
    "posgresql://tester:secret@127.0.0.1/postgres": "did you mean 'postgresql'",
    "redis://:secret@127.0.0.1/0": "no database that can keep a study",
    "https://127.0.0.1/studies?token=secret": "no database that can keep a study",
    "postgresql://tester:se@cret@127.0.0.1/postgres": "%40",
    "postgresql://tester:secret@127.0.0.1:port/postgres": "no URL of a database",
    "study.db": "no URL of a database",
    "postgresql://tester:${NOT_SET_ANYWHERE}@127.0.0.1/postgres": "variable NOT_SET_ANYWHERE is not set",
    "sqlite:///:memory:": "keeps nothing",
    "sqlite:////no/such/folder/studies.db": "unable to open",
}


def complaint(address: str) -> str:
    with pytest.raises(InputError) as caught:
        Database(address, "autoprune/run").close()
    return str(caught.value)


@pytest.mark.parametrize("address", WRONG)
def test_what_the_server_refuses_is_said_in_one_line(server: Server, address: str) -> None:
    password = sql.quote(PASSWORD, safe="")
    text = complaint(address.format(port=server.port, password=password))
    assert WRONG[address] in text
    assert ":***@" in text
    assert not [secret for secret in ("\n", PASSWORD, password, ":wrong") if secret in text]


@pytest.mark.parametrize("address", WRONG_ANYWHERE)
def test_an_address_that_is_none_is_said_in_one_line(address: str) -> None:
    if "postgresql:" in address:
        pytest.importorskip("psycopg2")
    text = complaint(address)
    assert re.search(WRONG_ANYWHERE[address], text)
    assert "secret" not in text
    assert "cret@" not in text
    assert "\n" not in text


def test_the_command_line_ends_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("psycopg2")
    job = tmp_path / "job.yaml"
    job.write_text(tiny_job(storage="postgresql://tester:secret@127.0.0.1:1/postgres").dump())
    assert command_line(["search", str(job), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("autoprune: cannot open the storage postgresql+psycopg2://tester:***@127.0.0.1:1/postgres: ")


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg2")
    monkeypatch.setattr(sql, "CONNECT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = time.monotonic()
        text = complaint(f"postgresql://tester:secret@127.0.0.1:{deaf.getsockname()[1]}/postgres")
        assert "timeout" in text
        assert time.monotonic() - began < 10


def test_what_cannot_be_parsed_is_masked_whole() -> None:
    assert masked("postgresql:/u:pass/word@host/db?sslpassword=x") == "***@host/db"
    assert masked("postgresql://u:p@ss@host/db") == "postgresql://***@host/db"


def test_the_file_of_an_sqlite_database_is_relative_to_the_job(tmp_path: Path) -> None:
    job = Job.from_dict({"task": {"name": "digits"}, "storage": "sqlite:///studies.db"}, tmp_path)
    assert job.storage_url == f"sqlite:///{tmp_path}/studies.db"
    assert Job.loads(job.dump()).storage_url == job.storage_url
    assert "storage" not in job.portable()
    assert at_budgets(job, (0.5,)).storage is None, "compare keeps its records in files"


@pytest.mark.skipif(shutil.which("optuna-dashboard") is None, reason=NO_DASHBOARD)
@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_the_dashboard_reads_the_study(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if kind == "journal":
        run = search(tiny_job(), out=tmp_path / "run").finish()
        address, name = str(run.path / JOURNAL), "autoprune"
    else:
        server, run = request.getfixturevalue("server"), request.getfixturevalue("tiny_run")
        address, name = server.url(sql.quote(PASSWORD, safe=""), "postgresql+psycopg2"), "autoprune/tiny"
    port = free_port()
    command = ["optuna-dashboard", "--port", str(port), "--server", "wsgiref", "--quiet"]
    process = subprocess.Popen([*command, address.replace("{", "{{")], stderr=subprocess.PIPE)
    try:
        (study,) = [s for s in ask(process, port, "/api/studies")["study_summaries"] if s["study_name"] == name]
        detail = ask(process, port, f"/api/studies/{study['study_id']}")
        assert detail["objective_names"] == ["loss", "macs"]
        assert {"job", "versions", "horizon"} <= {a["key"] for a in detail["user_attrs"]}
        assert len(detail["trials"]) == len(run.study.trials)
        assert {t["state"] for t in detail["trials"]} == {"Complete"}
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[bytes], port: int, path: str) -> Any:
    """The dashboard's answer, once it is up."""
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                return json.load(answer)
        except urllib.error.URLError as error:
            starting = process.poll() is None and time.monotonic() < until
            if not isinstance(error.reason, ConnectionRefusedError) or not starting:
                raise
            time.sleep(0.1)
