"""Take points from a finished run, prune fresh weights, save one. usage: python examples/apply_policy.py RUN_DIR."""

import sys
from pathlib import Path

import autoprune
from autoprune.tasks.digits import Digits


def main(run_dir: Path) -> None:
    task = Digits()
    front = autoprune.load_front(run_dir / "policy.json")
    model = task.build()
    for at in ("macs=0.5", "knee"):
        point = front.select(at)
        small = autoprune.apply(point, model, task.example_inputs(), task=task)  # the lent model is untouched
        score = task.metrics(small, task.split("test"))["accuracy"]
        print(f"{at}: point {point.id}, {point.ratio('macs'):.3f} of the MACs, test accuracy {score:.4f}")
    autoprune.save(small, run_dir / "small")  # autoprune.load builds it again


if __name__ == "__main__":
    main(Path(sys.argv[1]))
