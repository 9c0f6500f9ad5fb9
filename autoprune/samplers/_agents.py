"""stable-baselines3 agents outside their own loop: act on a state, learn from finished walks, touch no global state."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import Box
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from autoprune.allocation.walk import State, Walk

KEPT = 512  # walks in the replay buffer
BATCH = 64
ENTROPY = 0.003  # weight of SAC's entropy: its own default would look for noise of the size of the whole range
ROLLOUT = 8  # finished walks that PPO learns from at once


@dataclass
class Steps:
    """One walk as an agent remembers it: states [groups], actions, and what PPO has to know of its own opinion."""

    states: list[State] = field(default_factory=list)
    actions: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class Agent(Protocol):
    """`explores` says whether its own actions are noisy, so that nobody else has to add noise."""

    explores: bool

    def act(self, state: State, steps: Steps) -> float:
        """The next action, about [-1, 1]; what is needed to learn from it is noted in `steps`."""

    def remember(self, steps: Steps, reward: float) -> None:
        """Take in one finished walk; every step of it gets the reward (as in the paper)."""

    def train(self, gradient_steps: int) -> None:
        """Learn from the walks taken in."""


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Global generators of Python, numpy and torch (CPU) seeded and one thread; all as before afterwards."""
    python, numpy_, torch_, threads = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.get_num_threads(),
    )
    if threads != 1:  # the order of a sum over threads would show in the last bit, and a resume could not repeat it
        torch.set_num_threads(1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(torch_)
        if threads != 1:
            torch.set_num_threads(threads)


class OffPolicy:
    """DDPG, TD3 or SAC: every walk goes to the replay buffer, some gradient steps follow."""

    def __init__(self, model: OffPolicyAlgorithm, habits: Habits) -> None:
        model.set_logger(Logger(None, []))
        self._model = model
        self._sequential, self._pull = habits.sequential, habits.pull
        self.explores = isinstance(model, SAC)

    def act(self, state: State, steps: Steps) -> float:
        action, _ = self._model.policy.predict(state, deterministic=not self.explores)
        steps.states.append(state)
        return float(action[0])

    def remember(self, steps: Steps, reward: float) -> None:
        buffer = self._model.replay_buffer
        assert buffer is not None
        following = [*steps.states[1:], np.zeros_like(steps.states[-1])]
        for t, (state, after, action) in enumerate(zip(steps.states, following, steps.actions, strict=True)):
            # with one terminal reward and no discount the return is the reward at every step: nothing to bootstrap
            done = not self._sequential or t == len(steps.states) - 1
            flags, rewards = np.array([done]), np.array([reward - self._pull * action**2])
            buffer.add(state[None], after[None], np.array([[action]], dtype=np.float32), rewards, flags, [{}])

    def train(self, gradient_steps: int) -> None:
        self._model.train(gradient_steps, BATCH)


class OnPolicy:
    """PPO: walks are collected until there are ROLLOUT of them, then learned from and forgotten."""

    explores = True

    def __init__(self, model: PPO) -> None:
        self._model = model
        self._collected: deque[tuple[Steps, float]] = deque()

    def act(self, state: State, steps: Steps) -> float:
        with torch.no_grad():
            action, value, log_prob = self._model.policy(torch.from_numpy(state)[None])
        steps.states.append(state)
        steps.values.append(float(value))
        steps.log_probs.append(float(log_prob))
        return float(action)

    def remember(self, steps: Steps, reward: float) -> None:
        if len(steps.log_probs) == len(steps.states):  # else its actions were not PPO's own
            self._collected.append((steps, reward))

    def train(self, gradient_steps: int) -> None:
        while len(self._collected) >= ROLLOUT:
            self._update([self._collected.popleft() for _ in range(ROLLOUT)])

    def _update(self, walks: list[tuple[Steps, float]]) -> None:
        buffer = self._model.rollout_buffer
        buffer.reset()
        for walk, terminal in walks:
            for t, (state, action) in enumerate(zip(walk.states, walk.actions, strict=True)):
                last = t == len(walk.states) - 1
                value, log_prob = torch.tensor([walk.values[t]]), torch.tensor([walk.log_probs[t]])
                reward_now = np.array([terminal if last else 0.0])
                buffer.add(state[None], np.array([[action]]), reward_now, np.array([t == 0]), value, log_prob)
        buffer.compute_returns_and_advantage(torch.zeros(1), np.array([True]))
        self._model.train()


@dataclass(frozen=True)
class Habits:
    """How an agent learns. After `warm_up` walks of noise `sigma` that falls by `decay` a walk, and learning starts.

    Noise is on the scale of actions, [-1, 1]; `gradient_steps` are those of a walk, None is one for each group.
    `sequential` bootstraps from the next state; otherwise the critic learns the return itself, less `pull` times the
    square of the action: without it small errors of the critic drive all actions to the ends of their range.
    """

    sigma: float
    decay: float
    warm_up: int
    gradient_steps: int | None
    layers: tuple[int, ...]
    learning_rate: float
    tau: float
    sequential: bool
    pull: float

    def noise(self, walks: int) -> float:
        """Standard deviation of the noise in walk number `walks`, from 0."""
        return self.sigma * self.decay ** max(0, walks - self.warm_up)


class _Spaces(gymnasium.Env[State, npt.NDArray[np.float32]]):
    """What SB3 reads the spaces off; no walk is ever made in it."""

    def __init__(self, walk: Walk) -> None:
        low, high = (np.array([f[side] for f in walk.features], dtype=np.float32) for side in (1, 2))
        self.observation_space = Box(low, high, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), dtype=np.float32)


def build_agent(name: str, walk: Walk, habits: Habits) -> Agent:
    """The agent called `name`, whose first mean action is 0; call it inside `isolated`."""
    spaces = _Spaces(walk)
    net: dict[str, Any] = {"net_arch": list(habits.layers)}
    common: dict[str, Any] = {"learning_rate": habits.learning_rate, "gamma": 1.0, "device": "cpu"}
    if name == "ppo":
        size = ROLLOUT * walk.n_steps
        net["log_std_init"] = math.log(habits.sigma)
        ppo = PPO("MlpPolicy", spaces, n_steps=size, batch_size=size // 2, gae_lambda=1.0, policy_kwargs=net, **common)
        ppo.set_logger(Logger(None, []))
        _zero(ppo.policy.action_net)
        return OnPolicy(ppo)
    common |= {"buffer_size": KEPT * walk.n_steps, "tau": habits.tau, "policy_kwargs": net}
    if name == "sac":
        sac = SAC("MlpPolicy", spaces, ent_coef=ENTROPY, **common)
        _zero(sac.actor.mu)
        _zero(sac.actor.log_std, math.log(habits.sigma))
        return OffPolicy(sac, habits)
    model = (TD3 if name == "td3" else DDPG)("MlpPolicy", spaces, **common)
    _zero(model.actor.mu[-2])
    return OffPolicy(model, habits)


def _zero(layer: Any, bias: float = 0.0) -> None:
    """Make a last layer say `bias` whatever the state."""
    layer.weight.data.zero_()
    layer.bias.data.fill_(bias)
