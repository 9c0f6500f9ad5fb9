"""The AMC walk as a gymnasium environment, `autoprune/AMC-v0`: any agent can search for pruning policies.

Importing this module registers it; `gymnasium.make("autoprune.env:autoprune/AMC-v0", job=...)` imports it as well.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box

from autoprune.allocation.budget import lattice
from autoprune.allocation.sensitivity import Table
from autoprune.allocation.walk import CLASSIC_FEATURES, RESIDUAL_FEATURES, Episode, State, build_walk
from autoprune.errors import InputError, one_line
from autoprune.evaluation import Ask, Evaluation
from autoprune.protocols import Evaluator, Problem

if TYPE_CHECKING:
    from autoprune.run.setting import Setting

ID = "autoprune/AMC-v0"
OBSERVATIONS = {"residual": RESIDUAL_FEATURES, "classic": CLASSIC_FEATURES}
"""The entries of the observation by profile: name, range and meaning of each."""
FAILURE = -10.0
"""Reward of a policy that could not be evaluated."""

Action = npt.NDArray[np.float32]


class AmcEnv(gymnasium.Env[State, Action]):
    """One step for each group, in structure order; at the last one the policy is evaluated once, the only reward.

    Observation: float32 [features], see OBSERVATIONS. Action: [1] in [-1, 1]; with profile "residual" it moves a group
    away from its width in the knapsack's solution, with "classic" it is the keep ratio (action + 1) / 2, clipped so
    that the budget stays within reach. Either way the policy's cost is at most the target. Each walk has a target:
    `target`, or the `target` of reset's options, or one drawn from the budget range. Reward: the log of the knapsack's
    loss at that target less the log of the policy's ("residual"), or -loss ("classic"); FAILURE where the evaluation
    failed. The last `info` holds policy (widths by group), loss, costs, target, and error where there is one. `folder`
    is a temporary one that `close` removes.

    Raises:
        InputError: unknown profile, no sensitivity table where it needs one, or a target out of reach.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  # gymnasium's own name and kind

    def __init__(
        self,
        problem: Problem,
        evaluate: Evaluator,
        profile: str = "residual",
        target: float | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self.problem = problem
        self._evaluate = evaluate
        self._walk = build_walk(problem, profile)
        self._target = target
        self._targets = lattice(problem.budget)
        self._references: dict[float, float | None] = {}  # target -> loss of the knapsack's policy there
        self._known = {e.ask: e for e in problem.seeds}
        self._episode: Episode | None = None
        self._folder = folder
        if target is not None:
            self._walk.start(target)
        low, high = (np.array([f[side] for f in self._walk.features], dtype=np.float32) for side in (1, 2))
        self.observation_space = Box(low, high, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[State, dict[str, Any]]:
        """Start a walk; `options={"target": 0.5}` sets its budget."""
        super().reset(seed=seed)
        target = (options or {}).get("target", self._target)
        if target is None:
            target = self.np_random.choice(self._targets)
        self._episode = self._walk.start(float(target))
        return self._walk.observe(self._episode), {"target": float(target)}

    def step(self, action: Action) -> tuple[State, float, bool, bool, dict[str, Any]]:
        """Decide on the next group; after the last one (terminated, reward, info with the policy)."""
        if self._episode is None or self._episode.step == self._walk.n_steps:
            raise InputError("the walk is over; call reset() first")
        self._walk.act(self._episode, float(np.clip(np.asarray(action).reshape(-1)[0], -1.0, 1.0)))
        done = self._episode.step == self._walk.n_steps
        reward, info = self._end(self._episode) if done else (0.0, {"target": self._episode.target})
        return self._walk.observe(self._episode), reward, done, False, info

    def close(self) -> None:
        """Remove the temporary folder, if the environment made one."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _end(self, episode: Episode) -> tuple[float, dict[str, Any]]:
        policy = self._walk.policy(episode)
        evaluation = self._evaluated(Ask(policy, self.problem.tier))
        info = {
            "target": episode.target,
            "policy": policy.as_dict(),
            "loss": evaluation.loss,
            "costs": dict(evaluation.costs),
        }
        if not evaluation.ok:
            return FAILURE, {**info, "error": evaluation.error}
        return self._walk.reward(evaluation.loss, self._reference(episode.target)), info

    def _reference(self, target: float) -> float | None:
        """Loss of the policy that rewards at this target are relative to, measured once."""
        prior = self._walk.prior(target)
        if prior is not None and target not in self._references:
            evaluation = self._evaluated(Ask(prior, self.problem.tier))
            self._references[target] = evaluation.loss if evaluation.ok else None
        return self._references.get(target)

    def _evaluated(self, ask: Ask) -> Evaluation:
        """The answer to `ask`; equal asks are evaluated once, and a failure is a value."""
        if ask not in self._known:
            try:
                self._known[ask] = self._evaluate(ask)
            except Exception as error:  # the user's code may fail in any way, and that is a value
                self._known[ask] = Evaluation.failed(ask, one_line(error))
        return self._known[ask]


def make_env(job: Any, profile: str = "residual", target: float | None = None, out: str | Path | None = None) -> AmcEnv:
    """The environment of a job (a path, a mapping or a Job), evaluated in this process.

    The level database and the sensitivity table go to the folder `out`, by default to a temporary one that `close`
    removes.

    Raises:
        InputError: the job is wrong.
    """
    from autoprune.files.job import Job
    from autoprune.run.prepare import prepare  # the model's side, and torch with it, only when a job asks for it

    parsed = Job.of(job)
    with ExitStack() as undo:
        folder = None
        if out is None:
            folder = tempfile.TemporaryDirectory(prefix="autoprune-amc-")
            undo.callback(folder.cleanup)
            out = folder.name
        setting = prepare(parsed, Path(out))
        problem, evaluate = setting.problem, setting.evaluator_factory()()
        if profile.removeprefix("amc-") != "classic":  # the paper's walk knows no sensitivities
            problem = replace(problem, table=_table(setting, evaluate))
        env = AmcEnv(problem, evaluate, profile, target, folder)
        undo.pop_all()
    return env


def _table(setting: Setting, evaluate: Evaluator) -> Table:
    """The sensitivity table, from its file or measured now."""
    from autoprune.run.before import measured_table

    plan = setting.table_plan(setting.job.search.trials)
    path, answers = setting.table_path(plan), lambda asks: (evaluate(ask) for _, ask in asks)
    stages = measured_table(setting.structure, path, plan, answers)
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return cast("Table", end.value)


if ID not in gymnasium.registry:
    gymnasium.register(ID, entry_point="autoprune.env:make_env")
