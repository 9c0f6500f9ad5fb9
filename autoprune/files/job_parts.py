"""The sections of a job file, each checked at birth; `job.py` reads the file and puts them together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from autoprune import plugins
from autoprune.errors import did_you_mean
from autoprune.files.job_values import Bytes, Count, Natural, Rate, Share, Sparsity, Step, Weight, Widths
from autoprune.files.machine import machine_memory, usable_cores
from autoprune.files.part import Part
from autoprune.protocols import Budget, Direction

GRANULARITIES = ("auto", "channel", "head", "kv_group", "neuron", "block")
LATER = ("bits", "weight")
"""Kinds that policy files may know and this version does not search."""
DEFAULT_AT = (0.7, 0.5, 0.3)
RAY_ONLY = ("address", "resources", "runtime_env")


class TaskPart(Part):
    """A task by `name` (a file of autoprune/tasks) or by `factory` ("module:function"), and its arguments."""

    name: str | None = None
    factory: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_two(self) -> TaskPart:
        if (self.name is None) == (self.factory is None):
            raise ValueError("give either name or factory")
        if self.name is not None:
            check_plugin("tasks", self.name)
        if self.factory is not None and ":" not in self.factory:
            raise ValueError(f"factory must look like 'module:function', not {self.factory!r}")
        return self

    @property
    def target(self) -> str:
        return self.name or self.factory or ""


class OverridePart(Part):
    """What `space.overrides` may change for the groups that a glob matches."""

    multiple_of: Step | None = None
    max_sparsity: Sparsity | None = None


class SpacePart(Part):
    """Which groups are searched: `granularity` auto takes all structured kinds that the model has.

    Widths come in steps of `multiple_of` channels, `auto` leaves at most 32 a group.
    """

    granularity: str | tuple[str, ...] = "auto"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    multiple_of: Step = "auto"
    max_sparsity: Sparsity = 0.9
    overrides: dict[str, OverridePart] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_granularity(self) -> SpacePart:
        for word in self.kinds:
            if word in LATER or re.fullmatch(r"\d+:\d+", word):
                raise ValueError(f"granularity {word!r} is not in this version; it has {', '.join(GRANULARITIES)}")
            if word not in GRANULARITIES:
                raise ValueError(f"unknown granularity {word!r}; {did_you_mean(word, GRANULARITIES)}")
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"granularity names a kind twice: {', '.join(self.kinds)}")
        if "auto" in self.kinds and len(self.kinds) > 1:
            raise ValueError("granularity: auto stands alone, it is all kinds that the model has")
        if not self.kinds:
            raise ValueError(f"granularity lists nothing; allowed: {', '.join(GRANULARITIES)}")
        return self

    @field_validator("granularity", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        for word in value if isinstance(value, list | tuple) else [value]:
            if isinstance(word, int) and not isinstance(word, bool):
                n, m = divmod(word, 60)  # YAML 1.1 reads 2:4 as a number to the base of 60
                raise ValueError(f"{word} is no granularity; YAML reads {n}:{m} so unless it is quoted: '{n}:{m}'")
            if not isinstance(word, str):
                raise ValueError(f"{word!r} is no granularity; allowed: {', '.join(GRANULARITIES)}")
        return value

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.granularity,) if isinstance(self.granularity, str) else self.granularity


class CriterionPart(Part):
    """What an atom is worth: a file of autoprune/criteria or "module:Class", and its own options; or just its name."""

    name: str = "obs"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _known(self) -> CriterionPart:
        check_plugin("criteria", self.name)
        return self

    @model_serializer
    def plain(self) -> str | dict[str, Any]:
        """As a job writes it: the name where there are no options."""
        return {"name": self.name, "options": self.options} if self.options else self.name


class MetricLoss(Part):
    """One of the task's own metrics as the loss of the search; it is the task that says which way is better."""

    metric: str
    direction: Direction | None = None


def _loss_branch(value: object) -> str:
    return "~metric" if isinstance(value, dict | MetricLoss) else "~name"


def _check_loss(name: object) -> object:
    if not isinstance(name, str):
        raise ValueError(f"must be auto, the name of a loss or {{metric: ..., direction: ...}}, not {name!r}")
    if name != "auto":
        check_plugin("losses", name)
    return name


LossName = Annotated[str, BeforeValidator(_check_loss)]
Loss = Annotated[Annotated[LossName, Tag("~name")] | Annotated[MetricLoss, Tag("~metric")], Discriminator(_loss_branch)]


class ObjectivesPart(Part):
    """What is minimised: a loss against the dense outputs (or a task metric) and the costs beside it.

    `loss` auto is the one that fits the outputs: kl where there are classes, bernoulli_kl for one logit or several
    labels, mse otherwise; the run says which and why.
    """

    loss: Loss = "auto"
    costs: tuple[str, ...] = Field(default=("macs",), min_length=1)

    @property
    def logarithmic(self) -> bool:
        """Whether losses compare by their logarithm: a fidelity does, a task's own metric counts as it is."""
        return isinstance(self.loss, str)

    @model_validator(mode="after")
    def _known_costs(self) -> ObjectivesPart:
        for cost in self.costs:
            check_plugin("costs", cost)
        return self


class BudgetPart(Part):
    """`macs: [low, high]` is the range that the front should cover, `at` the asked budgets, `params: 0.6` a limit."""

    model_config = ConfigDict(extra="allow")
    at: tuple[Share, ...] | None = None

    @model_validator(mode="after")
    def _one_range(self) -> BudgetPart:
        for name, value in self._given.items():
            check_plugin("costs", name)
            _check_ratio(name, value)
        ranges = [name for name, value in self._given.items() if isinstance(value, list | tuple)]
        if len(ranges) != 1:
            raise ValueError(f"exactly one cost needs a range [low, high], as in macs: [0.3, 0.9]; ranges: {ranges}")
        return self

    @property
    def _given(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def plain(self) -> Budget:
        """The same as the core's Budget."""
        cost = next(name for name, value in self._given.items() if isinstance(value, list | tuple))
        low, high = (float(v) for v in self._given[cost])
        limits = {name: float(value) for name, value in self._given.items() if name != cost}
        asked = [at for at in DEFAULT_AT if low <= at <= high] if self.at is None else self.at
        return Budget(cost, low, high, tuple(asked), limits)


def _check_bound(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"must look like '>=0.97' or '<=0.1', not {value!r}")
    return value


Bound = Annotated[str, BeforeValidator(_check_bound)]


class SearchPart(Part):
    """Who searches, for how long, from which seed; `options` go to the sampler.

    `trials` is the ledger: as many full evaluations at the fitness tier (a partial one costs its share of samples).
    `patience` stops after so many full evaluations without a larger hypervolume, `time_limit_s` after so many seconds;
    `warm_start` is a policy file of the same structure whose points seed the search.
    """

    sampler: str = "evolution"
    trials: Count = 300
    seed: Natural = 0
    window: Count = 16
    patience: Count | None = None
    time_limit_s: Annotated[float, Field(gt=0.0)] | None = None
    warm_start: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_sampler(self) -> SearchPart:
        check_plugin("samplers", self.sampler)
        return self


class EvaluatorPart(Part):
    """How many samples score a candidate, at which tier and precision, and how the finalists are tuned.

    `sensitivity` is the number of widths of each group in the sensitivity table, 0 for none; auto is 5, fewer where the
    table would cost more than the search's trials (then, if need be, at the `stitch` tier). `finalists` are tuned at
    each asked budget; `precision` auto is bf16 where the machine that starts the search has instructions for it and
    the model bears it, else fp32; policy.json tells which. `memory` ("4GB") is what the compensated weights that were
    made so far may take on a machine, all its workers together. `repair`: a candidate's weights are compensated, its
    norms corrected and its layers refitted (`full`), its norms alone (`norm`), or nothing (`none`).
    """

    calibration: Count = 2048
    validation: Count = 1024
    fitness: Literal["auto", "stitch", "refit", "tune"] = "auto"
    finalists: Natural = 8
    finetune_steps: Natural = 100
    sensitivity: Widths = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")
    memory: Bytes = "auto"
    repair: Literal["full", "norm", "none"] = "full"

    @property
    def memory_bytes(self) -> int:
        """Bytes of level database entries to keep on a machine; auto is an eighth of its memory."""
        return machine_memory() // 8 if isinstance(self.memory, str) else int(self.memory)

    @property
    def has_table(self) -> bool:
        """Whether a sensitivity table may be measured."""
        return self.sensitivity != 0

    @property
    def tuned_finalists(self) -> int:
        """Finalists that get the brief fine-tune at each asked budget; 0 where it has no steps."""
        return self.finalists if self.finetune_steps > 0 else 0

    @property
    def leaves_tier(self) -> bool:
        """Whether the run chooses its fitness tier itself: it asks the brief fine-tune which one ranks as it does."""
        return self.fitness == "auto" and self.finetune_steps > 0


class ComparePart(Part):
    """The control arms of `search` and `compare`: closed forms by name, or "module:function" for your own.

    The last that the space can take is the one that a verdict measures the others against.
    """

    controls: tuple[str, ...] = ("uniform", "global")

    @model_validator(mode="after")
    def _known_controls(self) -> ComparePart:
        for name in self.controls:
            check_plugin("strategies", name)
        if len(set(self.controls)) < len(self.controls):
            raise ValueError(f"controls name an arm twice: {', '.join(self.controls)}")
        return self


class ExecutorPart(Part):
    """Where evaluations run; nothing here changes a result.

    `options` are the executor's own. With `kind: ray`: the cluster's `address`, what each worker takes
    (`resources: {cpu: 1, gpu: 0.25}`, custom ones by their name), and Ray's `runtime_env` for your code
    (`working_dir`, `py_modules` and so on); they may stand here or among `options`, and are the same.
    """

    kind: str = "local"
    workers: int | str = "auto"
    timeout_s: Annotated[float, Field(gt=0.0)] = 600.0
    retries: Natural = 2
    address: str | None = None
    resources: dict[str, Annotated[float, Field(ge=0.0)]] | None = None
    runtime_env: dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _one_place(cls, given: Any) -> Any:
        """Ray's own options to their keys, so that they are checked and made absolute in one place."""
        options = given.get("options") if isinstance(given, dict) and given.get("kind") == "ray" else None
        if not isinstance(options, dict):
            return given
        moved = {key: options[key] for key in RAY_ONLY if key in options}
        return {**moved, **given, "options": {k: v for k, v in options.items() if k not in moved}}

    @model_validator(mode="after")
    def _known_kind(self) -> ExecutorPart:
        check_plugin("executors", self.kind)
        whole = isinstance(self.workers, int) and self.workers >= 1
        if self.workers != "auto" and not whole:
            raise ValueError(f"workers must be auto or a whole number from 1, not {self.workers!r}")
        lost = [key for key in RAY_ONLY if getattr(self, key) is not None and self.kind != "ray"]
        if lost:
            raise ValueError(f"{', '.join(lost)} belongs to kind: ray (or --ray ADDRESS), not to kind: {self.kind}")
        return self

    @property
    def n_workers(self) -> int:
        """Workers to start: the cores that this process may use where the job says auto."""
        return self.workers if isinstance(self.workers, int) else usable_cores()


class RecoveryPart(Part):
    """How a pruned model is trained back in full: a file of autoprune/recovery or "module:Class", and its options."""

    schedule: str = "one_shot"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_schedule(self) -> RecoveryPart:
        check_plugin("recovery", self.schedule)
        return self


class FinetunePart(Part):
    """The long fine-tuning of finalists after the search: how many points and recipes, and the recipes' ranges.

    `samples` counts recipes over all points; `learning_rate` is by default around the usual one of the model's
    optimizer; `distillation` is its share of the loss, the task's own loss has the rest.
    """

    points: Count = 4
    samples: Count = 12
    epochs: tuple[Count, Count] = (1, 4)
    learning_rate: tuple[Rate, Rate] | None = None
    distillation: tuple[Weight, Weight] = (0.5, 1.0)

    @model_validator(mode="after")
    def _ascending(self) -> FinetunePart:
        for name in ("epochs", "learning_rate", "distillation"):
            low, high = getattr(self, name) or (0, 0)
            if low > high:
                raise ValueError(f"{name} must be a range [low, high], not [{low}, {high}]")
        if self.samples < self.points:
            raise ValueError(f"samples must be at least points, a recipe for each: {self.samples} < {self.points}")
        return self


def check_plugin(folder: plugins.Folder, name: str, *others: str) -> None:
    """A ValueError with the nearest name unless `name` is of `folder` or `others`, or a user's module:attribute."""
    known = (*others, *plugins.names(folder))
    if ":" not in name and name not in known:
        what = plugins.SINGULAR.get(folder, folder.removesuffix("s"))
        raise ValueError(f"unknown {what} {name!r}; {did_you_mean(name, known)}")


def _check_ratio(name: str, value: object) -> None:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    ratios = [float(n) for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and 0.0 < n <= 1.0]
    whole = len(ratios) == len(numbers)
    if not whole or (isinstance(value, list | tuple) and (len(ratios) != 2 or ratios[0] > ratios[1])):
        raise ValueError(f"{name} must be a range [low, high] or an upper limit, ratios in (0, 1], not {value!r}")
