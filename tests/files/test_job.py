"""The job file: checked at the door, every complaint one line that names the key and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autoprune.criteria import build_criterion
from autoprune.errors import InputError
from autoprune.evaluator.settings import COSTS
from autoprune.files.job import Job, changed_keys
from autoprune.protocols import Budget
from autoprune.run.prepare import settings_of
from autoprune.space import Space

MINIMAL = {"task": {"name": "digits"}}
SEARCH_SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))


def write(folder: Path, data: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_every_setting_but_the_task_has_a_default() -> None:
    job = Job.from_dict(MINIMAL)
    assert job.budget.plain() == Budget("macs", 0.3, 0.9, (0.7, 0.5, 0.3), {})
    assert job.search_space() == Space()
    assert (job.criterion.name, job.search.sampler, job.search.trials, job.search.window) == (
        "obs",
        "evolution",
        300,
        16,
    )
    assert job.executor.n_workers >= 1


def test_a_whole_job_reaches_plain_values(tmp_path: Path) -> None:
    data = {
        **MINIMAL,
        "space": {"include": ["layer*"], "multiple_of": 4, "overrides": {"layer1.*": {"max_sparsity": 0.5}}},
        "objectives": {"loss": {"metric": "accuracy", "direction": "maximize"}, "costs": ["macs", "params"]},
        "budget": {"macs": [0.2, 0.8], "params": 0.7, "at": [0.5]},
        "executor": {"kind": "local", "workers": 3},
    }
    job = Job.load(write(tmp_path, data))
    assert job.budget.plain() == Budget("macs", 0.2, 0.8, (0.5,), {"params": 0.7})
    space = job.search_space()
    assert (space.include, space.multiple_of, dict(space.overrides)) == (
        ("layer*",),
        4,
        {"layer1.*": {"max_sparsity": 0.5}},
    )
    assert job.executor.n_workers == 3


@pytest.mark.parametrize("path", SEARCH_SPACES, ids=lambda p: p.stem)
def test_every_published_job_loads_and_survives_being_dumped(path: Path) -> None:
    job = Job.load(path)
    again = Job.loads(job.dump())
    assert again.plain() == job.plain()
    assert again.sha256 == job.sha256
    assert changed_keys(job, again) == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.trails=3", "unknown key 'search.trails'; did you mean 'trials'"),
        ("serach.trials=3", "unknown key 'serach'; did you mean 'search'"),
        ("search.trials=0", "search.trials: .*greater than or equal to 1, not 0"),
        ("search.trials=yes", "search.trials: .*integer, not True"),
        ("search.sampler=evolutoin", "unknown sampler 'evolutoin'; did you mean 'evolution'"),
        ("criterion=l1norm", "unknown criterion 'l1norm'; did you mean 'l1_norm'"),
        ("task.name=digit", "unknown task 'digit'; did you mean 'digits'"),
        ("task={}", "give either name or factory"),
        ("task={factory: nothing}", "must look like 'module:function'"),
        ("objectives.costs=[mac]", "unknown cost 'mac'; did you mean 'macs'"),
        ("objectives.loss=kll", "objectives.loss: unknown loss 'kll'; did you mean 'kl'"),
        (
            "objectives.loss={metric: accuracy, directon: maximize}",
            "'objectives.loss.directon'; did you mean 'direction'",
        ),
        ("budget.macs=0.5", "exactly one cost needs a range"),
        ("budget.macs=[0.9, 0.3]", "macs must be a range"),
        ("budget.at=[0.05]", "lies outside the range"),
        ("budget.mac=0.5", "unknown cost 'mac'"),
        ("space.granularity=[channel, channel]", "granularity names a kind twice: channel, channel"),
        ("space.granularity=true", "True is no granularity; allowed: auto, channel"),
        ("space.granularity=4.0", "4.0 is no granularity; allowed: auto, channel"),
        ("space.granularity=chanel", "unknown granularity 'chanel'; did you mean 'channel'"),
        ("space.granularity=[weight, '2:4']", "granularity: weight and 2:4 exclude each other; name one of them"),
        ("space.granularity=['4:8', channel, '2:4']", "granularity: 4:8 and 2:4 exclude each other"),
        ("space.granularity='4:2'", "granularity: '4:2' is no pattern n:m with n below m, such as 2:4"),
        ("space.granularity='0:4'", "granularity: '0:4' is no pattern n:m with n below m"),
        ("space.granularity='a:4'", "granularity: 'a:4' is no pattern n:m"),
        ("space.granularity=[auto, weight]", "auto stands alone, it is all structured kinds"),
        ("space.granularity=weight", "cost 'macs' does not see zeros, .*; take nonzeros, effective_macs or bytes"),
        ("space.granularity=['2:4', bits]", "cost 'macs' does not see zeros"),
        ("space.overrides={a: {max_sparsty: 0.1}}", "max_sparsty'; did you mean 'max_sparsity'"),
        ("evaluator.device=cpuu", "evaluator.device"),
        ("latency.runtime=onnx", "unknown runtime 'onnx'; did you mean 'onnxruntime'"),
        ("latency.runtime=aut", "unknown runtime 'aut'; did you mean 'auto'"),
        ("latency.runtime=tensorrt", "unknown runtime 'tensorrt'; allowed: auto, compile, cuda_graphs, eager, onnx"),
        ("latency.threads=0", "latency.threads: Input should be greater than or equal to 1, not 0"),
        ("latency.threads=two", "latency.threads: Input should be a valid integer, not 'two'"),
        ("executor.kind=locl", "unknown executor 'locl'; did you mean 'local'"),
        ("evaluator.sensitivity=many", "sensitivity: must be auto or a whole number from 0, not 'many'"),
        ("executor.workers=0", "workers must be auto or a whole number from 1, not 0"),
        ("version=2", "version: Input should be 1, not 2"),
        ("search", "--set takes key=value"),
        ("criterion.x=1", "'criterion' is not a section"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, {**MINIMAL, "criterion": "obs", "budget": {"macs": [0.3, 0.9]}})
    with pytest.raises(InputError, match=message) as caught:
        Job.load(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "a job is a mapping"), ("", "mapping")]
)
def test_a_file_that_is_no_job_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Job.load(write(tmp_path, text))
    assert "job.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"cannot read the job file nowhere.yaml"):
        Job.load("nowhere.yaml")


def test_asked_budgets_default_to_those_inside_the_range() -> None:
    assert Job.from_dict({**MINIMAL, "budget": {"macs": [0.4, 0.9]}}).budget.plain().at == (0.7, 0.5)


def test_a_criterion_is_a_name_or_a_name_with_options_and_is_written_as_it_was_meant() -> None:
    plain = [Job.from_dict({**MINIMAL, "criterion": c}).plain()["criterion"] for c in ("taylor", {"name": "taylor"})]
    assert plain == ["taylor", "taylor"]
    tilted = {"name": "mine:Tilted", "options": {"power": 2}}
    job = Job.from_dict({**MINIMAL, "criterion": tilted})
    assert job.plain()["criterion"] == tilted == Job.loads(job.dump()).plain()["criterion"]
    assert changed_keys(job, Job.from_dict({**MINIMAL, "criterion": "mine:Tilted"})) != ()


def test_an_executors_own_options_stand_apart_and_rays_end_in_one_place() -> None:
    own = Job.from_dict({**MINIMAL, "executor": {"kind": "mine:Slow", "options": {"nap_s": 1}}})
    assert own.executor_options == {"nap_s": 1} == Job.loads(own.dump()).executor_options
    among = Job.from_dict({**MINIMAL, "executor": {"kind": "ray", "options": {"address": "auto"}}})
    beside = Job.from_dict({**MINIMAL, "executor": {"kind": "ray", "address": "auto"}})
    assert among.executor_options == beside.executor_options == {"address": "auto"}
    assert among.plain() == beside.plain()
    with pytest.raises(InputError, match=r"unknown key 'executor\.nap_s'.* go under executor\.options"):
        Job.from_dict({**MINIMAL, "executor": {"nap_s": 1}})


def test_trials_may_grow_and_the_executor_may_change_between_calls() -> None:
    old = Job.from_dict(MINIMAL)
    wider = {**MINIMAL, "search": {"trials": 500}, "executor": {"kind": "inline", "workers": 1, "timeout_s": 5}}
    assert changed_keys(old, Job.from_dict(wider)) == ()


def test_any_other_difference_between_calls_is_named() -> None:
    old = Job.from_dict(MINIMAL)
    new = Job.from_dict({**MINIMAL, "criterion": "l1_norm", "search": {"trials": 100, "seed": 1, "options": {"a": 1}}})
    assert changed_keys(old, new) == ("criterion", "search.options", "search.options.a", "search.seed", "search.trials")


def test_a_job_of_one_thread_is_written_as_it_was_before_it_could_say_so() -> None:
    old, two = Job.from_dict(MINIMAL), Job.from_dict({**MINIMAL, "latency": {"threads": 2}})
    assert old.plain()["latency"] == {"runtime": "auto", "batch_size": 1, "models": 24}
    assert Job.from_dict({**MINIMAL, "latency": {"threads": 1}}).sha256 == old.sha256 != two.sha256
    assert Job.loads(two.dump()).latency.threads == 2
    assert changed_keys(old, two) == ("latency.threads",)


FACTORY = """
from pathlib import Path
from autoprune.tasks.digits import Digits

def good(data: Path, size: int = 3):
    assert data.is_absolute() and data.name == "x.npy", data
    return Digits()

class Scores:
    def __init__(self, table: Path | None = None, kind: str = "sum"):
        self.table, self.kind = table, kind
    def __call__(self, model, groups, task):
        return {}

class Remote:
    def __init__(self, factory, workers, timeout_s, retries, *, keys: Path, host: str):
        self.keys, self.host = keys, host

def bad(): return 3
def ill(): raise RuntimeError("no disk")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_module.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "users_module", raising=False)
    return "users_module"


def test_paths_of_a_task_are_relative_to_the_job_file_wherever_it_is_dumped(tmp_path: Path, module: str) -> None:
    job = Job.load(write(tmp_path, {"task": {"factory": f"{module}:good", "args": {"data": "sub/../x.npy"}}}))
    assert job.plain()["task"]["args"] == {"data": str(tmp_path / "x.npy")}
    assert Job.loads(job.dump(), base=tmp_path / "elsewhere").build_task().directions["accuracy"] == "maximize"


def test_paths_among_the_options_of_a_plug_in_are_relative_to_the_job_file(tmp_path: Path, module: str) -> None:
    options = {"table": "sub/../scores.npy", "kind": "sum"}
    given = {
        **MINIMAL,
        "criterion": {"name": f"{module}:Scores", "options": options},
        "executor": {"kind": f"{module}:Remote", "options": {"keys": "keys", "host": "keys"}},
    }
    job = Job.load(write(tmp_path, given))
    assert job.criterion_named == {
        "name": f"{module}:Scores",
        "options": {**options, "table": f"{tmp_path}/scores.npy"},
    }
    assert job.executor_options == {"keys": f"{tmp_path}/keys", "host": "keys"}
    again = Job.loads(job.dump(), base=tmp_path / "elsewhere")
    assert again.plain() == job.plain()
    assert job.portable()["criterion"]["options"] == options
    assert build_criterion(again.criterion_named).table == tmp_path / "scores.npy"
    with pytest.raises(InputError, match="has no 'Remoto'; did you mean 'Remote'"):
        Job.load(write(tmp_path, {**given, "executor": {"kind": "users_module:Remoto", "options": {"a": "b"}}})).plain()


def test_a_job_that_names_no_loss_goes_on_with_that_of_its_run(tmp_path: Path) -> None:
    begun = Job.from_dict({"task": {"name": "digits"}, "objectives": {"loss": "kl"}})
    job = Job.from_dict({"task": {"name": "digits"}}, base=tmp_path, source="mine.yaml")
    assert job.objectives.loss == "auto"
    assert not changed_keys(begun, job.continuing(begun))
    assert (job.continuing(begun).name, job.continuing(begun).objectives.costs) == ("mine", ("macs",))
    told = Job.from_dict({"task": {"name": "digits"}, "objectives": {"loss": {"metric": "a", "direction": "maximize"}}})
    silent = Job.from_dict({"task": {"name": "digits"}, "objectives": {"loss": {"metric": "a"}}})
    assert not changed_keys(told, silent.continuing(told))
    named = Job.from_dict({"task": {"name": "digits"}, "objectives": {"loss": "mse"}})
    assert changed_keys(begun, named.continuing(begun)) == ("objectives.loss",)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"factory": "users_module:goood"}, "has no 'goood'; did you mean 'good'"),
        ({"factory": "no_such_module:f"}, "cannot import 'no_such_module'"),
        ({"factory": "users_module:good", "args": {"dat": "x"}}, "task.args.dat is no argument.*did you mean 'data'"),
        ({"factory": "users_module:good"}, "needs task.args.data"),
        ({"factory": "users_module:bad"}, "returned a int without build, example_inputs"),
        ({"factory": "users_module:ill"}, "failed: RuntimeError: no disk"),
    ],
)
def test_a_task_that_cannot_be_built_is_one_line(module: str, task: dict[str, object], message: str) -> None:
    job = Job.from_dict({"task": task})
    with pytest.raises(InputError, match=message):
        job.build_task()


@pytest.mark.parametrize("kinds", ["weight", "2:4", ["channel", "weight"], ["channel", "4:8", "bits"]])
def test_zeros_are_searched_by_name_with_the_costs_that_see_them(kinds: str | list[str]) -> None:
    budget = {"nonzeros": [0.05, 0.7], "at": [0.3]}
    job = Job.from_dict(
        {**MINIMAL, "space": {"granularity": kinds}, "objectives": {"costs": ["nonzeros"]}, "budget": budget}
    )
    assert job.search_space().granularity == ((kinds,) if isinstance(kinds, str) else tuple(kinds))
    assert job.space.counted == ("nonzeros", "effective_macs")
    assert Job.loads(job.dump()).sha256 == job.sha256
    assert settings_of(job).costs == (*COSTS, "nonzeros", "effective_macs")


def test_a_job_without_zeros_tells_the_costs_that_it_told(tmp_path: Path) -> None:
    job = Job.from_dict(MINIMAL)
    assert job.space.counted == ()
    assert settings_of(job).costs == COSTS
    asked = Job.from_dict({**MINIMAL, "objectives": {"costs": ["macs", "nonzeros"]}})
    assert settings_of(asked).costs == (*COSTS, "nonzeros")


def test_a_latency_sees_bits_and_no_zeros() -> None:
    parts = {"task": {"name": "digits"}, "objectives": {"costs": ["latency"]}, "budget": {"latency": [0.3, 0.9]}}
    with pytest.raises(InputError, match="cost 'latency' does not see zeros"):
        Job.from_dict({**parts, "space": {"granularity": "weight"}})
    Job.from_dict({**parts, "space": {"granularity": ["weight", "bits"]}})
