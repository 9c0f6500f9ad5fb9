"""The AMC agents: DDPG, TD3, SAC or PPO walk the groups; a walk is an ask, its terminal reward comes with the tell."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.allocation.budget import lattice
from autoprune.allocation.walk import Episode, build_walk
from autoprune.errors import InputError, did_you_mean
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.protocols import Budget, FloatArray, Problem

if TYPE_CHECKING:
    from autoprune.samplers._agents import Habits, Steps

AGENTS = ("ddpg", "td3", "sac", "ppo")
TRIES = 5  # walks, each with half as much noise again, before a policy is asked for a second time
FAILURE = -1.0  # reward of a failure while there is nothing worse to compare with
WARM_UP = 30  # walks before learning starts: a critic that knows few walks drives the actor into a corner for good
FADED = 0.05  # share of the first noise that is left at the end of the run
LEAST_SPREAD = 1e-6
OUTLIER = 3.0  # standard deviations that a reward may be off the mean; a few disasters must not fill the critic
MEMORY = 0.5  # share of the newest reward in the moving average that the paper subtracts


@dataclass
class _Open:
    """A walk that waits for its evaluation. `free` if the agent chose its actions, else they were all 0."""

    episode: Episode
    steps: Steps
    free: bool


class Amc:
    """AMC (He et al. 2018) with agents of stable-baselines3; every ask is a whole walk to a budget (`autoprune.walk`).

    Profile "residual": actions move away from the knapsack's solution, which is the first walk at each target; targets
    come from a lattice over the budget range; learning starts after 30 walks, and from there the noise falls from
    `sigma` to a twentieth over `problem.n_trials` walks; `problem.table` is needed. Profile "classic": the paper's
    state, clip, noise (truncated normal, .5 in keep ratio, for 100 walks without learning, then times .95 a walk) and
    moving-average baseline; targets are `budget.at` in turn, one agent and one baseline for all, though the paper's
    state does not name the target: for one budget it is the paper's. Noise is the standard deviation of an action in
    [-1, 1]; SAC and PPO start from it and go on by their own.

    Raises:
        InputError: unknown agent or profile, an option out of range, a budget out of reach, or no table.
    """

    one_objective = True

    @staticmethod
    def uses(options: Mapping[str, Any]) -> tuple[bool, bool]:
        """Whether it wants the sensitivity table and seeds: the paper's profile knows neither."""
        residual = not str(options.get("profile", "")).endswith("classic")
        return residual, residual

    def __init__(
        self,
        problem: Problem,
        rng: np.random.Generator,
        *,
        agent: str = "ddpg",
        profile: str = "residual",
        sigma: float | None = None,
        gradient_steps: int | None = None,
    ) -> None:
        if agent not in AGENTS:
            raise InputError(f"search.options.agent: unknown agent {agent!r}; {did_you_mean(str(agent), AGENTS)}")
        self._walk = build_walk(problem, profile, "search.options.profile")
        self._residual = self._walk.prior(problem.budget.high) is not None
        from autoprune.samplers import _agents  # torch and SB3 are loaded when an agent is wanted

        self._habits = _habits(_agents.Habits, self._residual, problem.n_trials, sigma, gradient_steps)
        self._guard, self._new_steps = _agents.isolated, _agents.Steps
        self._problem, self._rng = problem, rng
        with self._guard(self._seed()):
            self._agent = _agents.build_agent(agent, self._walk, self._habits)
        self._targets = lattice(problem.budget) if self._residual else _asked_budgets(problem.budget)
        self._asked = self._told = 0  # walks, and those of them that were evaluated without failing
        self._open: deque[_Open] = deque()
        self._begun: set[float] = set()  # targets whose knapsack policy was asked for
        self._references: dict[float, float] = {}  # target -> loss of the knapsack's policy there
        self._seen: set[Policy] = {e.ask.policy for e in problem.seeds}
        self._known = {e.ask.policy: e.loss for e in problem.seeds if e.ok and _is_full(e, problem)}
        self._worst = math.inf
        self._average: float | None = None
        self._held: deque[tuple[Steps, float]] = deque()  # walks from before learning began
        self._scale: tuple[float, float] | None = None
        self._gradient_steps = self._habits.gradient_steps or self._walk.n_steps

    def ask(self) -> Ask:
        """One walk to a target: the knapsack's policy where it is not known yet, else what the agent makes of it."""
        target = self._target()
        prior = self._walk.prior(target)
        if prior is not None and prior in self._known:
            self._references.setdefault(target, self._known[prior])
        free = prior is None or target in self._references or target in self._begun
        self._begun.add(target)
        with self._guard(self._seed()):
            walked, policy = self._new_walk(target, free)
        self._asked += 1
        self._seen.add(policy)
        self._open.append(walked)
        return Ask(policy, self._problem.tier)

    def tell(self, evaluation: Evaluation) -> None:
        """The reward of the oldest open walk, for all of its steps; the agent learns."""
        walked = self._open.popleft()
        target = walked.episode.target
        if not walked.free:
            if evaluation.ok:
                self._references[target] = evaluation.loss
            else:
                self._begun.discard(target)  # another try at the next walk to this target
        reward = self._reward(evaluation, target)
        self._told += evaluation.ok
        with self._guard(self._seed()):
            if self._residual:
                self._learn_scaled(walked.steps, reward)
            else:
                self._learn_as_the_paper(walked.steps, reward)

    def _reward(self, evaluation: Evaluation, target: float) -> float:
        """Of the profile; a failure is as bad as the worst."""
        if not evaluation.ok:
            return min(self._worst, FAILURE)
        nearest = min(self._references, key=lambda known: abs(known - target), default=None)  # its own, if there is one
        reward = self._walk.reward(evaluation.loss, None if nearest is None else self._references[nearest])
        self._worst = min(self._worst, reward)
        return reward

    def _learn_scaled(self, steps: Steps, reward: float) -> None:
        """With rewards in standard deviations of the walks that were there when learning began."""
        self._held.append((steps, reward))
        if self._told < self._habits.warm_up:
            return
        if self._scale is None:
            rewards = np.array([r for _, r in self._held])
            self._scale = float(np.mean(rewards)), max(float(np.std(rewards)), LEAST_SPREAD)
        mean, spread = self._scale
        while self._held:
            walk, raw = self._held.popleft()
            self._agent.remember(walk, float(np.clip((raw - mean) / spread, -OUTLIER, OUTLIER)))
        self._agent.train(self._gradient_steps)

    def _learn_as_the_paper(self, steps: Steps, reward: float) -> None:
        """With rewards less their moving average."""
        self._average = reward if self._average is None else self._average + MEMORY * (reward - self._average)
        self._agent.remember(steps, reward - self._average)
        if self._told > self._habits.warm_up:
            self._agent.train(self._gradient_steps)

    def _target(self) -> float:
        if self._residual:
            return float(self._rng.choice(self._targets))
        return float(self._targets[self._asked % len(self._targets)])

    def _new_walk(self, target: float, free: bool) -> tuple[_Open, Policy]:
        """A walk to a policy that was not asked for yet, if there is one within a few tries."""
        noise = self._habits.noise(self._asked)
        for _ in range(TRIES if self._residual and free else 1):
            walked = self._one_walk(target, free, noise)
            policy = self._walk.policy(walked.episode)
            if policy not in self._seen:
                break
            noise *= 1.5
        return walked, policy

    def _one_walk(self, target: float, free: bool, noise: float) -> _Open:
        episode, steps = self._walk.start(target), self._new_steps()
        for _ in range(self._walk.n_steps):
            state = self._walk.observe(episode)
            if free:
                action = self._agent.act(state, steps)
                if not self._agent.explores:
                    action = self._noisy(action, noise)
            else:
                steps.states.append(state)
                action = 0.0
            steps.actions.append(action)
            self._walk.act(episode, float(np.clip(action, -1.0, 1.0)))
        return _Open(episode, steps, free)

    def _noisy(self, mean: float, noise: float) -> float:
        """Normal around `mean`, truncated to [-1, 1]: drawn again a few times, then clipped."""
        draws: FloatArray = mean + noise * self._rng.standard_normal(16)
        inside = draws[np.abs(draws) <= 1.0]
        return float(inside[0]) if len(inside) else float(np.clip(draws[0], -1.0, 1.0))

    def _seed(self) -> int:
        return int(self._rng.integers(2**31))


def _habits(
    make: type[Habits], residual: bool, n_trials: int, sigma: float | None, gradient_steps: int | None
) -> Habits:
    """Of the profile, with the user's own `sigma` and `gradient_steps`."""
    if residual:
        habits = make(
            sigma=0.6,
            decay=FADED ** (1 / max(n_trials - WARM_UP, 1)),
            warm_up=WARM_UP,
            gradient_steps=10,
            layers=(64, 64),
            learning_rate=1e-3,
            tau=0.02,
            sequential=False,
            pull=0.5,
        )
    else:  # as in the authors' code, but for the learning rate, of which SB3 has one for actor and critic
        habits = make(
            sigma=1.0,
            decay=0.95,
            warm_up=100,
            gradient_steps=None,
            layers=(300, 300),
            learning_rate=1e-3,
            tau=0.01,
            sequential=True,
            pull=0.0,
        )
    if sigma is not None:
        if not (isinstance(sigma, int | float) and 0 < sigma <= 2):
            raise InputError(f"search.options.sigma must be above 0 and at most 2, not {sigma!r}")
        habits = replace(habits, sigma=float(sigma))
    if gradient_steps is not None:
        if not (isinstance(gradient_steps, int) and gradient_steps >= 1):
            raise InputError(f"search.options.gradient_steps must be an integer of 1 or more, not {gradient_steps!r}")
        habits = replace(habits, gradient_steps=gradient_steps)
    return habits


def _asked_budgets(budget: Budget) -> FloatArray:
    """The budgets of the finalists within the range; its upper end where there is none."""
    return np.array([t for t in budget.at if budget.low <= t <= budget.high] or [budget.high])


def _is_full(evaluation: Evaluation, problem: Problem) -> bool:
    ask = evaluation.ask
    return ask.tier == problem.tier and ask.fraction == 1.0 and ask.split == "fitness"
