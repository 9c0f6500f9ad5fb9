"""The run folder's mirror: another machine goes on from it, it is never torn, and its failures never end a search."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli import run as command_line
from autoprune.comparison.comparison import Comparison
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.job import Job
from autoprune.front import Front
from autoprune.record import mirror
from autoprune.record.mirror import Mirror
from autoprune.record.storage import JOURNAL
from autoprune.run.folder_checks import MIRRORED
from autoprune.run.run import Run, search
from tests import killable_mirror
from tests.conftest import ROOT, autoprune_process, importing_alike, until
from tests.killable_compare import tiny_job
from tests.mirrors import BUCKET, folder, line, s3, server, url  # noqa: F401 - fixtures among them

TRIALS = {"trials": 16}


def figures(front: Front) -> list[tuple[Any, ...]]:
    """What must not depend on where a run ran."""
    return [(p.id, p.policy, dict(p.costs), {k: dict(v) for k, v in p.metrics.items()}, p.trial) for p in front]


def trials(run: Run) -> list[tuple[str, int]]:
    return [(t.user_attrs["stage"], t.user_attrs["ask"]) for t in run.study.get_trials()]


def events(folder: Path) -> list[str]:
    """What log.jsonl says of the mirror."""
    log = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return [e["what"] for e in log if e["event"] == "mirror"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same search without a mirror."""
    return search(tiny_job(search=TRIALS), out=tmp_path_factory.mktemp("plain")).finish()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Ask]:
    """Every ask that is really evaluated in this process."""
    seen: list[Ask] = []
    evaluate = TieredEvaluator.__call__

    def noted(self: TieredEvaluator, ask: Ask) -> Evaluation:
        seen.append(ask)
        return evaluate(self, ask)

    monkeypatch.setattr(TieredEvaluator, "__call__", noted)
    return seen


@pytest.mark.parametrize("url", ["path", "memory", "s3"], indirect=True)
def test_a_run_lost_with_its_machine_goes_on_from_the_mirror(
    url: str, plain: Run, asked: list[Ask], tmp_path: Path
) -> None:
    job = tiny_job(search=TRIALS, sync_to=url)
    first = iter(search(job, out=tmp_path / "first"))
    for _ in range(15):
        next(first)
    first.close()  # type: ignore[attr-defined]  # interrupted; its folder is never looked at again
    evaluated = set(asked)
    asked.clear()
    second = search(job, out=tmp_path / "second").finish()
    assert "goes on from its mirror" in second.note
    assert figures(second.front) == figures(plain.front)
    assert trials(second) == trials(Run(tiny_job(search=TRIALS), plain.path, None))
    assert len(evaluated) >= 10
    assert not evaluated & set(asked), "what the mirror held is not evaluated again"
    asked.clear()
    third = search(job, out=tmp_path / "third")
    assert figures(third.front) == figures(plain.front)
    assert asked == []
    assert events(third.path) == ["fetched", "fetched"]


@pytest.mark.parametrize("url", ["path"], indirect=True)
def test_the_mirror_of_a_finished_run_holds_its_files_and_no_others(url: str, tmp_path: Path) -> None:
    run = search(tiny_job(sync_to=url), out=tmp_path / "run").finish()
    (run.path / "mine.json").write_text("{}")
    (run.path / "database" / "levels.safetensors.77.part").write_bytes(b"half")
    with Mirror(run.path, url, MIRRORED):
        pass
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "database").mkdir()
    held = Mirror(copy, url, MIRRORED)
    held.fetch()
    kept = (p.name for p in (run.path / "database").glob("*.*") if p.is_file() and p.suffix != ".part")
    names = {*MIRRORED, *(f"database/{name}" for name in kept)}
    names -= {"job.yaml", "proxy.json", "finetune.json"}
    assert {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} == names
    for name in names - {"log.jsonl"}:
        assert (copy / name).read_bytes() == (run.path / name).read_bytes()
    assert held.job() == (run.path / "job.yaml").read_text()


def test_a_run_killed_in_the_middle_loses_only_what_came_after_the_last_mirror(plain: Run, tmp_path: Path) -> None:
    shared, lost = tmp_path / "shared", tmp_path / "lost"
    kept = shared / JOURNAL
    command = [sys.executable, killable_mirror.__file__, str(lost), str(shared), str(TRIALS["trials"])]
    process = subprocess.Popen(command, env=importing_alike())
    sizes: list[int] = []
    while process.poll() is None:
        content = kept.read_bytes() if kept.exists() else b""
        assert content == b"" or content.endswith(b"\n"), "no reader ever sees a torn line"
        sizes += [] if sizes and sizes[-1] == len(content) else [len(content)]
        if content.count(b'"search"') >= 3:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    assert process.returncode == -signal.SIGKILL
    assert len(sizes) >= 2
    content, whole = kept.read_bytes(), (lost / JOURNAL).read_bytes()
    assert whole.startswith(content)
    behind = [json.loads(text) for text in whole[len(content) :].splitlines() if text.endswith(b"}")]
    times = [datetime.fromisoformat(e["datetime_start"]).timestamp() for e in behind if "datetime_start" in e]
    assert all(at > kept.stat().st_mtime - 0.5 for at in times), "what was lost is younger than the last mirror"
    job = tiny_job(search=TRIALS, sync_to=str(shared))
    again = search(job, out=tmp_path / "new machine")
    assert figures(again.front) == figures(plain.front)
    assert (again.path / JOURNAL).read_bytes().startswith(content)
    search(tiny_job(search=TRIALS), out=lost).finish()  # the machine was not lost after all, and went on for itself
    with pytest.raises(
        InputError, match=r"lost and its mirror .*shared have gone separate ways.*--out.*sync_to.*--fresh"
    ):
        search(job, out=lost)


def test_an_interrupted_command_mirrors_all_that_it_has(tmp_path: Path) -> None:
    shared, run = tmp_path / "shared", tmp_path / "run"
    job = tmp_path / "job.yaml"
    job.write_text(tiny_job(search={"trials": 5000}, sync_to=str(shared)).dump())
    process = autoprune_process("search", str(job), "--out", str(run), cwd=ROOT)
    until(lambda: (run / JOURNAL).exists() and (run / JOURNAL).read_bytes().count(b'"search"') > 12, 60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (shared / JOURNAL).read_bytes() == (run / JOURNAL).read_bytes()


def test_a_journal_that_is_being_written_is_mirrored_up_to_its_last_line(folder: Path, url: str) -> None:
    journal = folder / JOURNAL
    reader = Mirror(folder, url, MIRRORED)._store
    done = threading.Event()

    def write() -> None:
        with journal.open("ab", buffering=0) as file:
            for i in range(3, 200):
                text = line(i)
                file.write(text[:9])
                time.sleep(0.001)
                file.write(text[9:])
        done.set()

    writer = threading.Thread(target=write)
    with Mirror(folder, url, MIRRORED, every_s=0.005):
        writer.start()
        seen: set[int] = set()
        while not done.is_set():
            content = reader.read(JOURNAL) or b""
            seen.add(len(content))
            assert all(json.loads(text) for text in content.splitlines())
            assert content == b"" or content.endswith(b"\n")
        writer.join()
    assert len(seen) >= 3
    assert reader.read(JOURNAL) == journal.read_bytes()


def test_only_what_changed_is_sent_and_in_an_order_that_can_be_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    put = mirror._Store.put

    def noted(self: mirror._Store, name: str, content: bytes | Path) -> None:
        sent.append(name)
        put(self, name, content)

    monkeypatch.setattr(mirror._Store, "put", noted)
    with Mirror(folder, str(tmp_path / "shared"), MIRRORED, every_s=0.01):
        until(lambda: "policy.json" in sent)
        time.sleep(0.1)
        first = list(sent)
        (folder / "policy.json").write_text('{"points": []}')
    assert first == [mirror.PROBE, "database/0123456789abcdef.safetensors", "job.yaml", JOURNAL, "policy.json"]
    assert sent[len(first) :] == ["policy.json"]
    sent.clear()
    again = Mirror(folder, str(tmp_path / "shared"), MIRRORED)
    again.fetch()
    with again:
        pass
    assert "database/0123456789abcdef.safetensors" not in sent, "a level database that is there is not sent again"


@pytest.mark.parametrize(("here", "there", "after"), [(1, 3, 3), (3, 1, 3), (2, 2, 2), (0, 2, 2), (2, 0, 2)])
def test_of_two_journals_the_longer_wins(folder: Path, url: str, here: int, there: int, after: int) -> None:
    journal = folder / JOURNAL
    journal.write_bytes(b"".join(line(i) for i in range(there)))
    with Mirror(folder, url, MIRRORED):
        pass
    journal.write_bytes(b"".join(line(i) for i in range(here)) + b'{"torn')
    (folder / "policy.json").write_text('{"here": 1}')
    resumed = Mirror(folder, url, MIRRORED)
    resumed.fetch()
    assert journal.read_bytes().removesuffix(b'{"torn') == b"".join(line(i) for i in range(after))
    assert (folder / "policy.json").read_text() == ("{}" if there > here else '{"here": 1}')
    with resumed:
        pass
    assert resumed._store.read(JOURNAL) == b"".join(line(i) for i in range(after))


def test_journals_that_have_gone_separate_ways_are_refused_and_left_alone(folder: Path, url: str) -> None:
    with Mirror(folder, url, MIRRORED) as kept:
        pass
    ours = line(0) + line(1) + line(2, "b") + line(3, "b")
    (folder / JOURNAL).write_bytes(ours)
    with pytest.raises(InputError, match=r"have gone separate ways.*another --out .*another sync_to .*--fresh"):
        Mirror(folder, url, MIRRORED).fetch()
    assert (folder / JOURNAL).read_bytes() == ours
    assert kept._store.read(JOURNAL) == line(0) + line(1) + line(2)


def test_the_trials_of_another_run_are_never_written_over(folder: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "shared")
    with Mirror(folder, url, MIRRORED, every_s=0.01) as ours:
        kept = tmp_path / "shared" / JOURNAL
        until(kept.exists)
        theirs = kept.read_bytes() + line(3, "b")
        kept.write_bytes(theirs)
        with (folder / JOURNAL).open("ab") as file:
            file.write(line(3, "a"))
        until(lambda: bool(ours.behind))
    assert kept.read_bytes() == theirs
    assert "another run writes there too" in ours.news()


def test_a_mirror_of_another_job_is_refused_and_nothing_of_it_is_brought_here(tmp_path: Path) -> None:
    url = str(tmp_path / "shared")
    search(tiny_job(sync_to=url), out=tmp_path / "one").finish()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "shared").rglob("*") if p.is_file()}
    other = tiny_job(sync_to=url, search={"seed": 5})
    with pytest.raises(InputError, match=r"shared holds a run of another job: search\.seed differ"):
        search(other, out=tmp_path / "two")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "shared").rglob("*") if p.is_file()} == before
    assert not (tmp_path / "two").exists()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "job.yaml").write_text(tiny_job(search={"seed": 5}).dump())  # as a run without mirror leaves it
    with pytest.raises(InputError, match=r"search\.seed differ"):
        search(other, out=tmp_path / "two")


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_fresh_forgets_the_mirrors_run_and_only_once_the_new_job_is_good(url: str, tmp_path: Path) -> None:
    search(tiny_job(sync_to=url), out=tmp_path / "one").finish()
    store = Mirror(tmp_path / "one", url, MIRRORED)._store
    store.put("mine.json", b"{}")
    old = store.read(JOURNAL)
    with pytest.raises(InputError, match="out of reach"):
        search(tiny_job(sync_to=url, budget={"macs": [0.0001, 0.9]}), out=tmp_path / "two", fresh=True)
    assert store.read(JOURNAL) == old
    run = search(tiny_job(sync_to=url, search={"seed": 5}), out=tmp_path / "two", fresh=True).finish()
    assert store.read(JOURNAL) == (run.path / JOURNAL).read_bytes() != old
    assert store.read("mine.json") == b"{}"


def test_a_mirror_that_fails_in_the_middle_is_said_and_the_search_goes_on(
    plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "EVERY_S", 0.02)
    shared, away = tmp_path / "shared", tmp_path / "away"
    run = search(tiny_job(search=TRIALS, sync_to=str(shared)), out=tmp_path / "run")
    notes: list[str] = []
    for i, _ in enumerate(run):
        notes += [run.note] if run.note not in notes else []
        if i == 3:
            until((shared / JOURNAL).exists)
            shared.rename(away)
        elif i == 8:
            until(lambda: "failed" in events(run.path))
        elif i == 15:
            away.rename(shared)
    assert figures(run.front) == figures(plain.front)
    assert any(note.startswith(f"cannot mirror to {shared}: No such file") for note in notes)
    told = events(run.path)  # one more line where it fails over another file
    assert told[0] == "failed"
    assert set(told[: told.index("recovered")]) == {"failed"}
    assert (shared / JOURNAL).read_bytes() == (run.path / JOURNAL).read_bytes()


def test_a_mirror_that_ends_behind_is_said_by_a_run_that_succeeds(
    plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror.Mirror, "_turn", broken)
    job = tmp_path / "job.yaml"
    job.write_text(tiny_job(search=TRIALS, sync_to=str(tmp_path / "shared")).dump())
    assert command_line(["search", str(job), "--out", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is behind" in said
    assert "No space left on device" in said
    assert events(tmp_path / "run") == ["failed", "behind"]
    assert figures(Run(Job.load(job), tmp_path / "run", None).front) == figures(plain.front)


def broken(self: Mirror) -> None:
    raise OSError(28, "No space left on device")


def test_a_path_is_relative_to_the_job_file_and_may_change_between_calls(tmp_path: Path) -> None:
    given = {**tiny_job().plain(), "sync_to": "mirrors/run"}
    job = Job.from_dict(given, base=tmp_path)
    assert job.sync_url == job.plain()["sync_to"] == str(tmp_path / "mirrors" / "run")
    assert Job.from_dict({**given, "sync_to": "s3://bucket/run"}, base=tmp_path).sync_url == "s3://bucket/run"
    assert Job.from_dict({**given, "sync_to": "~/run"}, base=tmp_path).sync_url == str(Path("~/run").expanduser())


def test_arms_of_a_comparison_are_not_mirrored(tmp_path: Path) -> None:
    job = tiny_job(sync_to=str(tmp_path / "shared"))
    compared = Comparison(job, ("uniform", "random"), (0.6,), (0,), tmp_path / "compare")
    assert len(compared.document["rows"]) == 2
    assert not (tmp_path / "shared").exists()
    elsewhere = tiny_job(sync_to=str(tmp_path / "other"))
    again = Comparison(elsewhere, ("uniform", "random"), (0.6,), (0,), tmp_path / "compare").finish()
    assert again.kept == again.n_arms
