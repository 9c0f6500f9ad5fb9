"""Train a stock agent in the AMC environment. usage: python examples/amc_agent.py [JOB.yaml [WALKS]]."""

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise

import autoprune.env  # registers autoprune/AMC-v0

JOB = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"


class Best(BaseCallback):
    """Keeps what the best walk so far ended in."""

    reward, info = -np.inf, dict[str, Any]()

    def _on_step(self) -> bool:
        reward, info = self.locals["rewards"][0], self.locals["infos"][0]
        if "policy" in info and reward > self.reward:
            self.reward, self.info = float(reward), info
        return True


def main(job: Path, walks: int) -> None:
    env = gymnasium.make(autoprune.env.ID, job=str(job), target=0.5)
    groups = len(env.unwrapped.problem.structure)
    noise, net, best = NormalActionNoise(np.zeros(1), np.full(1, 0.3)), {"net_arch": [64, 64]}, Best()
    agent = TD3("MlpPolicy", env, gamma=1.0, action_noise=noise, policy_kwargs=net, batch_size=64, seed=0, device="cpu")
    agent.learn(walks * groups, callback=best)
    env.close()
    widths = ", ".join(f"{name} {width}" for name, width in best.info["policy"].items())
    print(f"at {best.info['costs']['macs']:.3f} of the MACs, KL {best.info['loss']:.4f}: {widths}")
    print(f"log of the knapsack's loss over this one's: {best.reward:+.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else JOB, int(sys.argv[2]) if len(sys.argv) > 2 else 60)
