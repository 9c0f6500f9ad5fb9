"""Search and prune your own model without writing a class. usage: python examples/own_model.py [RUN_DIR]."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune


def accuracy(outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
    return {"accuracy": float((outputs.argmax(-1) == targets).float().mean())}


def data() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Four disjoint splits; any iterable of (inputs, targets) that can be read again will do, a DataLoader too."""
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    names, sizes = ("train", "calibration", "validation", "test"), (797, 400, 300, 300)
    parts = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).split(sizes)
    return {name: [(inputs[rows], targets[rows])] for name, rows in zip(names, parts, strict=True)}


def trained(loaders: dict[str, list[tuple[Tensor, Tensor]]]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        for inputs, targets in loaders["train"]:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()


def main(run_dir: Path) -> None:
    loaders = data()
    model = trained(loaders)
    task = autoprune.task(model, loaders, F.cross_entropy, accuracy)
    job = {"budget": {"macs": [0.1, 0.9], "at": [0.5, 0.2]}, "search": {"trials": 60}}
    run = autoprune.search(job, task=task, out=run_dir)
    for at in (0.5, 0.2):
        small = autoprune.apply(run.front.select(macs=at), model, task.example_inputs(), task=task)
        dense, pruned = (task.metrics(m, task.split("test"))["accuracy"] for m in (model, small))
        print(f"at {at:.0%} of the MACs: accuracy {pruned:.3f} (dense {dense:.3f})\n{small}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_model"))
