"""The job file: the only reader of YAML. Checked once at the door, plain arguments below it."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from autoprune import plugins
from autoprune.errors import AutopruneError, InputError, did_you_mean
from autoprune.files.job_parts import (
    RAY_ONLY,
    Bound,
    BudgetPart,
    ComparePart,
    CriterionPart,
    EvaluatorPart,
    ExecutorPart,
    FinetunePart,
    MetricLoss,
    ObjectivesPart,
    RecoveryPart,
    SearchPart,
    TaskPart,
    check_plugin,
)
from autoprune.files.latency_part import LatencyPart
from autoprune.files.part import TAG, Part
from autoprune.files.space_part import OverridePart, SpacePart
from autoprune.protocols import Task

if TYPE_CHECKING:
    from autoprune.space import Space

MAY_CHANGE = ("executor.", "evaluator.memory", "search.time_limit_s", "sync_to", "finetune", "recovery")
DEFAULT_BUDGET = {"macs": [0.3, 0.9], "at": [0.7, 0.5, 0.3]}
Plugged = Literal["criterion", "executor", "search", "recovery"]
PLUGGED: Mapping[Plugged, tuple[plugins.Folder, str]] = {
    "criterion": ("criteria", "name"),
    "executor": ("executors", "kind"),
    "search": ("samplers", "sampler"),
    "recovery": ("recovery", "schedule"),
}
"""The sections with options of their own: the folder of their plug-in, and the key that names it."""
SHAPED = ("macs", "params", "kv_bytes")
"""Costs of shapes alone."""
LATENCY = "latency"
"""The cost that sees bits as well, and no zeros: no runtime is timed with them."""
TASK_MEMBERS = ("build", "example_inputs", "split", "loss", "metrics", "directions")


class Job(Part):
    """A whole search job. Build it with `Job.load(path)` or `Job.from_dict(data)`.

    `deploy` names the container that results must fit, `storage` is an Optuna storage URL in place of the run folder's
    journal, `sync_to` an fsspec URL that the run folder is mirrored to.
    """

    version: Literal[1] = 1
    task: TaskPart
    space: SpacePart = Field(default_factory=SpacePart)
    criterion: CriterionPart = Field(default_factory=CriterionPart)
    objectives: ObjectivesPart = Field(default_factory=ObjectivesPart)
    budget: BudgetPart = Field(default_factory=lambda: BudgetPart.model_validate(DEFAULT_BUDGET))
    search: SearchPart = Field(default_factory=SearchPart)
    constraints: dict[str, Bound] = Field(default_factory=dict)
    evaluator: EvaluatorPart = Field(default_factory=EvaluatorPart)
    compare: ComparePart = Field(default_factory=ComparePart)
    latency: LatencyPart = Field(default_factory=LatencyPart)
    executor: ExecutorPart = Field(default_factory=ExecutorPart)
    finetune: FinetunePart | None = None
    recovery: RecoveryPart = Field(default_factory=RecoveryPart)
    deploy: str | None = None
    storage: str | None = None
    sync_to: str | None = None
    _base: Path = PrivateAttr(default_factory=Path.cwd)
    _name: str = PrivateAttr(default="job")

    @model_validator(mode="after")
    def _agreement(self) -> Job:
        budget = self.budget.plain()
        if self.deploy is not None:
            check_plugin("deploy", self.deploy)
        if budget.cost not in self.objectives.costs:
            raise ValueError(
                f"the budget's cost {budget.cost!r} must be one of objectives.costs {self.objectives.costs}"
            )
        blind = SHAPED if "bits" in self.space.kinds or self.space.bits else (*SHAPED, LATENCY)
        if self.space.counted and self.space.shapeless and budget.cost in blind:
            raise ValueError(
                f"the budget's cost {budget.cost!r} does not see zeros, and space.granularity names nothing that it "
                f"sees; take {', '.join(self.space.counted)} or bytes"
            )
        outside = [at for at in budget.at if not budget.low <= at <= budget.high]
        if self.sync_to is not None and not self.sync_to.strip():
            raise ValueError("sync_to is empty; give a folder or a URL such as s3://bucket/run, or leave it out")
        if outside:
            raise ValueError(f"budget.at {outside} lies outside the range [{budget.low}, {budget.high}] of the front")
        return self

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
        """Read a job file; `overrides` are "search.trials=50"; its paths are relative to it.

        Raises:
            InputError: the file, a key or a value is wrong; one line that names file, key and what is allowed.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the job file {file}: {_reason(error)}") from error
        return Job.loads(text, base=file.resolve().parent, source=str(file), overrides=overrides)

    @staticmethod
    def of(given: Job | str | Path | Mapping[str, Any], task: Task | None = None) -> Job:
        """A job itself, the path of its file, or its plain values, which need no task where one is lent."""
        if task is not None:
            checked_task(task, "task is")
        if isinstance(given, Job):
            return given
        if isinstance(given, Mapping):
            return Job.from_dict(given if task is None else {"task": {"factory": "autoprune:task"}, **given})
        if isinstance(given, str | Path):
            return Job.load(given)
        raise InputError(f"job must be a path, a mapping or a Job, not {type(given).__name__}")

    @staticmethod
    def loads(text: str, base: Path | None = None, source: str = "job", overrides: Sequence[str] = ()) -> Job:
        """From YAML text; `base` is the folder that its paths are relative to."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise InputError(f"{source}: a job is a mapping with the keys {', '.join(Job.model_fields)}")
        for override in overrides:
            _override(data, override)
        return Job.from_dict(data, base, source)

    @staticmethod
    def from_dict(data: Mapping[str, Any], base: Path | None = None, source: str = "job") -> Job:
        """From plain values, with the same checks as a file."""
        try:
            job = Job.model_validate(dict(data))
        except ValidationError as error:
            raise InputError(f"{source}: {_one_line(error)}") from error
        job._base = (base or Path.cwd()).resolve()
        job._name = Path(source).stem
        return job

    @property
    def name(self) -> str:
        """The job file's name without its ending: what the default run folder is called."""
        return self._name

    def plain(self) -> dict[str, Any]:
        """All settings as plain values; file arguments of the task are absolute, so the result stands anywhere."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        data["task"]["args"] = self._placed(_task_factory(self.task), self.task.args)
        for section in PLUGGED:
            if options := self.options(section):
                data[section]["options"] = options
        if self.storage is not None:
            data["storage"] = self.storage_url
        if self.search.warm_start is not None:
            data["search"]["warm_start"] = _absolute(self._base, self.search.warm_start)
        data["executor"].update(self._ray_options)
        if self.sync_to is not None:
            data["sync_to"] = self.sync_url
        return data

    def portable(self) -> dict[str, Any]:
        """The settings that results depend on, paths as they were given: what a study carries to other machines."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"executor", "storage", "sync_to"})

    @property
    def storage_url(self) -> str | None:
        """`storage`, the file of an SQLite database made absolute."""
        if self.storage is None or not self.storage.startswith("sqlite:///") or self.storage.endswith(":memory:"):
            return self.storage
        return f"sqlite:///{_absolute(self._base, self.storage.removeprefix('sqlite:///'))}"

    @property
    def executor_options(self) -> dict[str, Any]:
        """What the executor takes beside workers, timeout and retries; folders of your code are absolute."""
        return {**self._ray_options, **self.options("executor")}

    @property
    def criterion_named(self) -> str | dict[str, Any]:
        """The criterion by its name, with its options where there are any."""
        options = self.options("criterion")
        return {"name": self.criterion.name, "options": options} if options else self.criterion.name

    def options(self, section: Plugged) -> dict[str, Any]:
        """The options in a section of the job; those that its plug-in annotates as a Path are absolute."""
        part, (folder, named_by) = getattr(self, section), PLUGGED[section]
        if not any(isinstance(value, str) for value in part.options.values()):
            return dict(part.options)
        return self._placed(plugins.load(folder, getattr(part, named_by)), part.options)

    def _placed(self, make: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `make`, paths among them absolute."""
        paths = plugins.path_parameters(make)
        return {k: _absolute(self._base, v) if k in paths else v for k, v in given.items()}

    @property
    def _ray_options(self) -> dict[str, Any]:
        given = {key: value for key in RAY_ONLY if (value := getattr(self.executor, key)) is not None}
        env = dict(given.get("runtime_env", {}))
        if isinstance(env.get("working_dir"), str):
            env["working_dir"] = _local(self._base, env["working_dir"])
        if isinstance(env.get("py_modules"), list):
            env["py_modules"] = [_local(self._base, module) for module in env["py_modules"]]
        return {**given, "runtime_env": env} if env else given

    @property
    def warm_start(self) -> Path | None:
        """The policy file whose points seed the search."""
        given = self.search.warm_start
        return None if given is None else Path(os.path.normpath(self._base / given))

    @property
    def sync_url(self) -> str | None:
        """Where the run folder is mirrored to: a URL as it is, a path absolute."""
        given = self.sync_to
        return given if given is None or "://" in given else str(_absolute(self._base, os.path.expanduser(given)))

    def dump(self) -> str:
        """The resolved job as YAML; `Job.loads(job.dump())` is the same job."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    @property
    def sha256(self) -> str:
        """Identifies the resolved job ("sha256:..")."""
        return "sha256:" + hashlib.sha256(self.dump().encode()).hexdigest()

    def build_task(self) -> Task:
        """The task: its class or factory called with `task.args`.

        Raises:
            InputError: it cannot be imported, does not take these arguments, fails, or returns no Task.
        """
        factory = _task_factory(self.task)
        args = self.plain()["task"]["args"]
        _check_arguments(factory, args, self.task.target)
        try:
            task = factory(**plugins.with_paths(factory, args))
        except AutopruneError:
            raise
        except Exception as error:  # a user's factory may fail in any way
            raise InputError(f"task {self.task.target!r} failed: {type(error).__name__}: {_flat(error)}") from error
        return checked_task(task, f"task {self.task.target!r} returned")

    def continuing(self, old: Job) -> Job:
        """This job with what `old` began with where it names nothing and the defaults were others once."""
        parts: dict[str, Any] = {}
        for part, key in (("objectives", "loss"), ("space", "multiple_of"), ("evaluator", "sensitivity")):
            mine = getattr(self, part)
            if key not in mine.model_fields_set:
                parts[part] = mine.model_copy(update={key: getattr(getattr(old, part), key)})
        loss, before = self.objectives.loss, old.objectives.loss
        if isinstance(loss, MetricLoss) and isinstance(before, MetricLoss) and loss.direction is None:
            said = loss.model_copy(update={"direction": before.direction})
            parts["objectives"] = self.objectives.model_copy(update={"loss": said})
        return self.model_copy(update=parts)

    def search_space(self) -> Space:
        """The same as the core's Space."""
        from autoprune.matrices import PRECISIONS
        from autoprune.space import Space

        s = self.space
        overrides = {glob: part.model_dump(exclude_none=True) for glob, part in s.overrides.items()}
        bits = s.bits or (PRECISIONS if "bits" in s.kinds else ())
        return Space(s.kinds, s.include, s.exclude, s.multiple_of, s.max_sparsity, overrides, bits)


def checked_task(task: Any, said: str) -> Task:
    """`task`, which has all that a Task must have; InputError that begins with `said` otherwise."""
    missing = [member for member in TASK_MEMBERS if not hasattr(task, member)]
    if missing:
        raise InputError(f"{said} a {type(task).__name__} without {', '.join(missing)}")
    checked: Task = task
    return checked


def changed_keys(old: Job, new: Job) -> tuple[str, ...]:
    """Keys whose difference forbids to resume `old` as `new`: trials may grow and the executor may change."""
    before, after = dict(_flatten(old.plain())), dict(_flatten(new.plain()))
    grown = {"search.trials"} if new.search.trials >= old.search.trials else set()
    different = (k for k in sorted({*before, *after} - grown) if before.get(k) != after.get(k))
    return tuple(k for k in different if not k.startswith(MAY_CHANGE))


def changed_since(held: Mapping[str, Any], job: Job) -> tuple[str, ...]:
    """`changed_keys` against another job's `portable()`; its relative paths are taken to start where `job`'s do."""
    before = Job.from_dict({**held, "storage": job.storage}, job._base, "the job of the recorded run")
    return changed_keys(before, job)


def _task_factory(part: TaskPart) -> Any:
    return plugins.load("tasks", part.name) if part.name is not None else plugins.load_object(part.target)


def _absolute(base: Path, value: object) -> object:
    return os.path.normpath(base / value) if isinstance(value, str | Path) else value


def _local(base: Path, value: object) -> object:
    """A path made absolute; a URI of a package elsewhere stays."""
    return value if isinstance(value, str) and "://" in value else _absolute(base, value)


def _check_arguments(factory: Any, args: Mapping[str, Any], target: str) -> None:
    if not callable(factory):
        raise InputError(f"task {target!r} is a {type(factory).__name__}, not a class or function")
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in args:
        if name not in parameters:
            raise InputError(f"task.args.{name} is no argument of task {target!r}; {did_you_mean(name, parameters)}")
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    missing = [name for name in needed if name not in args]
    if missing:
        raise InputError(f"task {target!r} needs task.args.{', task.args.'.join(missing)}")


def _override(data: dict[str, Any], override: str) -> None:
    """Set one "a.b.c=value" in place; the value is read as YAML."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set takes key=value, as in search.trials=50, not {override!r}")
    here = data
    for part in parts[:-1]:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise InputError(f"--set {override}: {part!r} is not a section of the job")
    try:
        here[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        quoted = f"a text may need quotes of its own, as in --set \"{key}='{value}'\""
        raise InputError(f"--set {override}: the value is not valid YAML; {quoted}") from error


def _one_line(error: ValidationError) -> str:
    """Every complaint of pydantic as `key: what is wrong`, joined; unknown keys name the nearest valid one."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(TAG))
        if item["type"] == "extra_forbidden":
            section, _, key = where.rpartition(".")
            own = f"; an executor's own go under executor.options, as {key} there" if section == "executor" else ""
            lines.append(f"unknown key {where!r}; {did_you_mean(key, _keys_of(section))}{own}")
        else:
            what = item["msg"].removeprefix("Value error, ")
            shown = "" if item["type"] in ("value_error", "missing") else f", not {item['input']!r}"
            lines.append(f"{where + ': ' if where else ''}{what}{shown}")
    return _flat("; ".join(lines))


def _keys_of(section: str) -> Sequence[str]:
    """The keys that the job allows in `section` ("" for the top, "space.overrides.layer1.*" for an override)."""
    if section.startswith("space.overrides."):
        return tuple(OverridePart.model_fields)
    model: type[BaseModel] = MetricLoss if section == "objectives.loss" else Job
    for part in section.split("."):
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        inner = next((a for a in get_args(inner) if a is not type(None)), inner)  # of an optional section
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    return tuple(model.model_fields)


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _flat(value: object) -> str:
    return " ".join(str(value).split())
