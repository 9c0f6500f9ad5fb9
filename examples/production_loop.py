"""Cut a point, train it in a loop of your own. usage: python examples/production_loop.py [RUN_DIR [KEY=VALUE ...]]."""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import autoprune
from autoprune.tasks.digits import Digits

JOB = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
EPOCHS = 4


def main(run_dir: Path, *changes: str) -> None:
    task = Digits()
    run = autoprune.search(autoprune.Job.load(JOB, changes), out=run_dir)  # a finished one is read
    dense = task.build().eval()
    point = run.front.select(macs=0.5)
    small = autoprune.apply(point, dense, task.example_inputs(), task=task, finetune="none")  # cut and repaired
    before = task.metrics(small.eval(), task.split("test"))["accuracy"]

    # from here on it is a plain module in a plain loop: your loader, loss, optimizer and scheduler
    optimizer = torch.optim.SGD(small.parameters(), 0.01, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        small.train()
        for inputs, targets in task.split("train"):
            with torch.no_grad():
                teacher = dense(inputs).softmax(-1)
            outputs = small(inputs)
            loss = 0.5 * F.cross_entropy(outputs, targets) + 0.5 * F.cross_entropy(outputs, teacher)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()

    after = task.metrics(small.eval(), task.split("test"))["accuracy"]
    autoprune.save(small, run_dir / "trained")  # autoprune.load builds it again, without this file
    print(f"{point.id}, {point.ratio('macs'):.2f} of the MACs: test accuracy {before:.4f} as cut, {after:.4f} trained")


if __name__ == "__main__":  # the search starts worker processes, which import this file
    run_dir, *changes = sys.argv[1:] or ["runs/production"]
    main(Path(run_dir), *(changes or ["search.trials=60"]))
