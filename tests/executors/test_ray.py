"""The Ray executor on real clusters of several nodes: the same results as local, and deaths of every kind."""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray import cloudpickle
from ray.cluster_utils import Cluster

import autoprune
from autoprune import plugins
from autoprune.database.build import build_database
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.shipment import Shipment
from autoprune.executors._ray_cluster import _check_listening, connect
from autoprune.executors.inline import Inline
from autoprune.executors.ray import Ray
from autoprune.files.held import PREFIX
from autoprune.policy import Policy
from autoprune.record.storage import JOURNAL
from tests import killable_run
from tests.conftest import RAY, ROOT, autoprune_process, importing_alike, until
from tests.contracts.test_executors import ASKS, Crash
from tests.families import FAMILIES
from tests.ray_clusters import SLOT, NoRoom, OnNode, Shared, add_node, node_number, start_cluster
from tests.run.test_resume import n_lines_of, recorded
from tests.small import RandomTask, world
from tests.synthetic import MakeHills, chain

pytestmark = RAY
STRUCTURE = chain(4)
ASK = Ask(Policy.dense(STRUCTURE), "refit")


def answers(executor: Ray, n: int) -> list[Evaluation]:
    found = [executor.next_done(timeout=120) for _ in range(n)]
    return [f[1] for f in found if f is not None]


def plain(evaluations: tuple[Evaluation, ...]) -> list[Evaluation]:
    """Without the wall time, which no two runs share."""
    return [replace(e, seconds=0.0) for e in evaluations]


@pytest.mark.usefixtures("cluster")
def test_one_and_four_workers_find_the_same_front_as_no_worker(tmp_path: Path) -> None:
    make = MakeHills(killable_run.STRUCTURE, fail_share=0.05)
    fronts = [plain(killable_run.run(tmp_path / "inline", 40, Inline(make)))]
    for workers in (1, 4):
        executor = Ray(make, workers, resources=SLOT)
        fronts.append(plain(killable_run.run(tmp_path / str(workers), 40, executor)))
    assert fronts[0] == fronts[1] == fronts[2]
    assert len(fronts[0]) > 1


@pytest.mark.usefixtures("cluster")
def test_a_task_lent_from_python_is_searched_on_the_cluster_as_in_this_process(tmp_path: Path) -> None:
    family = FAMILIES["plain"]
    task = RandomTask(family.build().eval(), family.shape)
    job = {
        "search": {"trials": 6},
        "evaluator": {"calibration": 64, "validation": 32, "finalists": 1, "finetune_steps": 2, "fitness": "refit"},
        "executor": {"kind": "ray", "workers": 2, "resources": SLOT},
    }
    run = autoprune.search(job, task=task, out=tmp_path / "ray").finish()
    here = autoprune.search({**job, "executor": {"kind": "inline"}}, task=task, out=tmp_path / "here").finish()
    assert [(p.policy, p.metrics) for p in run.front] == [(p.policy, p.metrics) for p in here.front]
    events = [json.loads(line) for line in (tmp_path / "ray" / "log.jsonl").read_text().splitlines()]
    assert "autoprune-" in next(e for e in events if e["event"] == "workers")["workers"][0]["name"]


@pytest.mark.usefixtures("cluster")
def test_workers_of_a_machine_share_entries_and_leave_nothing_of_them() -> None:
    w = world("plain")
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    shipment = Shipment.of(w.task, w.structure, database, Settings(calibration=64, validation=32, device="cpu"))
    folder = Path(tempfile.gettempdir()) / f"{PREFIX}{shipment.named}"
    half = Policy.of({g.name: max(g.grid[0], g.width // 2) for g in w.structure.groups})
    with closing(Ray(shipment, 2, resources=SLOT)) as executor:
        losses, index = set[float](), itertools.count()
        while not all(worker.done for worker in executor.workers()):
            for _ in range(2):
                executor.submit(next(index), Ask(half, "stitch"))
            losses |= {e.loss for e in answers(executor, 2)}
        assert len(losses) == 1
        assert len(list(folder.glob("*.held"))) == 2
        assert len(list(folder.glob("*.safetensors"))) == len(w.structure)
    assert not folder.exists()


@pytest.mark.usefixtures("cluster")
def test_workers_read_tensors_where_the_object_store_holds_them() -> None:
    x = torch.randn(64, 16, 32, 32)
    sent = (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16(), torch.arange(100_000), torch.ones(1) > 0)
    with closing(Ray(Shared(sent), 1, resources=SLOT)) as executor:
        executor.submit(0, ASK)
        seen = answers(executor, 1)[0].metrics
    assert [seen[f"sum{i}"] for i in range(5)] == [float(t.double().sum()) for t in sent]
    assert [seen[f"stride{i}"] for i in range(3)] == [1024, 1, 1024], "channels_last stays so"
    assert [seen[f"mapped{i}"] for i in range(4)] == [1.0] * 4


def test_an_ask_of_two_hundred_groups_is_small_on_the_wire() -> None:
    assert len(cloudpickle.dumps(Ask(Policy.dense(chain(200)), "refit"))) < 10_000


@pytest.mark.usefixtures("cluster")
def test_actors_carry_the_names_that_the_progress_view_shows() -> None:
    with closing(Ray(MakeHills(STRUCTURE), 2, resources=SLOT)) as executor:
        executor.submit(0, ASK)
        answers(executor, 1)
        assert {w.name for w in executor.workers()} <= set(ray.util.list_named_actors())
        assert any(w.node for w in executor.workers())


@pytest.mark.usefixtures("cluster")
def test_a_scrape_of_the_nodes_metrics_tells_answers_and_retries(tmp_path: Path) -> None:
    with closing(Ray(Crash(tmp_path, times=1, how="raise"), 1, resources=SLOT)) as executor:
        for index, ask in enumerate(ASKS[:5]):
            executor.submit(index, ask)
        answers(executor, 5)
        name = executor.workers()[0].name
        expected = {"answers": 6.0, "retries": 1.0}  # an answer that says "raised" is one too
        until(lambda: {k: scraped(f"autoprune_{k}", name) for k in expected} == expected, seconds=60)
        assert scraped("autoprune_busy_seconds", name) > 0


def scraped(metric: str, worker: str) -> float:
    """The sum of a counter over what all nodes export to Prometheus; older releases of Ray tell it by two names."""
    totals = {f"ray_{metric}": 0.0, f"ray_{metric}_total": 0.0}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as page:
            lines = page.read().decode().splitlines()
        for line in lines:
            name = line.partition("{")[0]
            if name in totals and f'worker="{worker}"' in line:
                totals[name] += float(line.split()[-1])
    return max(totals.values())


@pytest.mark.usefixtures("cluster")
def test_work_that_is_no_ask_is_spread_and_its_input_errors_are_the_users() -> None:
    items = [(i, torch.full((64, 64), float(i))) for i in range(12)]
    found = dict(Ray.each(lambda t: (float(t.sum()), ray.get_runtime_context().get_node_id()), items, resources=SLOT))
    assert {i: total for i, (total, _) in found.items()} == {i: 4096.0 * i for i in range(12)}
    assert len({node for _, node in found.values()}) > 0

    def refuse(item: torch.Tensor) -> None:
        raise InputError("no such thing")

    with pytest.raises(InputError, match=r"^no such thing$"):
        list(Ray.each(refuse, items, resources=SLOT))


def test_what_a_killed_node_was_at_is_done_elsewhere(cluster: Cluster) -> None:
    doomed = add_node(cluster, 2)

    def slow(item: int) -> int:
        time.sleep(1.0)
        return item * item

    found, gone = {}, False
    for number, square in Ray.each(slow, [(i, i) for i in range(10)], resources=SLOT):
        found[number] = square
        if not gone:
            cluster.remove_node(doomed, allow_graceful=False)
            gone = True
    assert found == {i: i * i for i in range(10)}


def test_a_killed_node_costs_no_answer_and_a_new_one_is_used(cluster: Cluster) -> None:
    doomed = add_node(cluster, 2)
    with closing(Ray(OnNode(STRUCTURE, seconds=1.0), 6, resources=SLOT)) as executor:
        until(
            lambda: executor.next_done(timeout=0.1) or all(w.state != "starting" for w in starting(executor)),
            seconds=60,
        )
        for index in range(24):
            executor.submit(index, ASK)
        first = answers(executor, 6)
        assert node_number(doomed) in {e.metrics["node"] for e in first}
        cluster.remove_node(doomed, allow_graceful=False)
        rest = answers(executor, 12)
        assert [e.ok for e in rest] == [True] * 12
        assert executor.retried > 0
        joined = add_node(cluster, 2)
        for index in range(60):
            executor.submit(index, ASK)
        until(lambda: node_number(joined) in {e.metrics["node"] for e in answers(executor, 4)}, seconds=70)
    cluster.remove_node(joined, allow_graceful=True)


def starting(executor: Ray) -> tuple[object, ...]:
    """The workers, after a look at what has come in."""
    executor.submit(-1, ASK)
    answers(executor, 1)
    return executor.workers()


def test_a_search_whose_driver_and_then_whose_cluster_was_killed_goes_on_with_another_cluster(
    cluster: Cluster, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = killable_run.run(whole, 60, Inline(MakeHills(killable_run.STRUCTURE, fail_share=0.05)))
    doomed, _ = start_cluster(2)
    try:
        first = driver(killed, doomed.address)
        reached(killed, first, n_lines=25)
        first.send_signal(signal.SIGKILL)
        assert first.wait(timeout=120) != 0
        second = driver(killed, doomed.address)
        reached(killed, second, n_lines=45)
    finally:
        doomed.shutdown()
    assert second.wait(timeout=120) != 0
    assert driver(killed, cluster.address).wait(timeout=120) == 0
    assert recorded(killed) == recorded(whole)
    front = killable_run.run(killed, 60, Inline(MakeHills(killable_run.STRUCTURE, log=str(tmp_path / "idle"))))
    assert plain(front) == plain(expected)
    assert not (tmp_path / "idle").exists(), "a finished run is replayed without any evaluation"


def reached(folder: Path, process: subprocess.Popen[bytes], n_lines: int) -> None:
    """Wait until the journal has so many lines, or the process is at its end."""
    until(lambda: process.poll() is not None or n_lines_of(folder / JOURNAL) >= n_lines, seconds=120)


def driver(folder: Path, address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, killable_run.__file__, str(folder), "60", address, str(folder / "log")]
    return subprocess.Popen(command, env=importing_alike())


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_ray_ends_for_memory_is_told_as_that_and_one_fewer_goes_on(tmp_path: Path) -> None:
    with closing(Ray(NoRoom(STRUCTURE, tmp_path / "told"), workers=2, resources=SLOT)) as executor:
        executor.submit(0, ASK)
        with pytest.warns(UserWarning, match=r"memory: 1 worker goes on; lower evaluator\.calibration"):
            (found,) = answers(executor, 1)
        assert found.ok
        assert (executor.slots, executor.retried, len(executor.workers())) == (1, 1, 1)


@pytest.mark.usefixtures("cluster")
def test_resources_that_no_node_offers_are_said_at_the_start() -> None:
    with pytest.raises(InputError, match=r"a worker takes CPU 1, GPU 3, which no node .* CPU 4, GPU 0; ask for less"):
        Ray.check(resources={"gpu": 3})


@pytest.mark.usefixtures("cluster")
def test_code_that_workers_cannot_import_is_the_first_workers_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text(
        "from tests.synthetic import Hills, chain\ndef make():\n    return Hills(chain(4))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    with closing(Ray(only_here.make, 1, resources=SLOT)) as executor:
        executor.submit(0, ASK)
        with pytest.raises(InputError, match=r"a worker cannot import .*No module named 'only_here'.*runtime_env"):
            executor.next_done()


DEAD = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("address", "known", "said"),
    [
        (DEAD, "", f"no Ray cluster answers at {DEAD}"),
        ("auto", DEAD, r"no Ray cluster answers at \S+:1 .*`ray stop`"),
        ("auto", "ray://127.0.0.1:10001", "ray job submit"),
        ("ray://127.0.0.1:10001", "", "ray job submit"),
        ("head", "", "must be auto, local or host:port"),
    ],
)
def test_no_cluster_at_the_address_is_one_line_within_seconds(
    monkeypatch: pytest.MonkeyPatch, address: str, known: str, said: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", known)
    started = time.monotonic()
    with pytest.raises(InputError, match=said) as caught:
        connect(address)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20


def test_no_cluster_is_one_line_of_the_command_before_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", DEAD)
    job = str(ROOT / "search_spaces" / "digits.yaml")
    process = autoprune_process("search", job, "--ray", "auto", cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.match(r"autoprune: .*no Ray cluster answers at \S+:1 .*`ray stop`", errors)
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_door_is_found_at_an_address_of_ipv6_as_well() -> None:
    with socket.socket(socket.AF_INET6) as door:
        try:
            door.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
        door.listen()
        address = f"[::1]:{door.getsockname()[1]}"
        _check_listening(address)
    with pytest.raises(InputError, match="no Ray cluster answers"):
        _check_listening(address)


def test_a_runtime_env_that_cannot_be_brought_to_workers_is_named(tmp_path: Path) -> None:
    job = str(ROOT / "search_spaces" / "digits.yaml")
    lacking = f"executor.runtime_env.working_dir={tmp_path}/nowhere"
    process = autoprune_process("search", job, "--ray", "local", "--set", lacking, cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith(
        f"autoprune: executor.runtime_env cannot be used: ValueError: directory {tmp_path}/nowhere"
    )
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
