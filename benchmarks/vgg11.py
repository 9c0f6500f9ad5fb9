"""A VGG-11 with batch norm and one linear layer (9.2 M parameters), trained here once on JPEG copies of CIFAR-10.

usage: OMP_NUM_THREADS=2 python -m benchmarks.vgg11 [--epochs 20]

16 000 of the 20 000 training images, the others are what the task cuts off for calibration and validation; random crops
and flips, SGD with Nesterov momentum and a one-cycle rate, bfloat16. After every epoch its state is kept, and the same
command goes on. Figures go into results/vgg11.json, weights into runs/.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.files.whole import write_whole
from autoprune.tasks._arrays import cut

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "runs" / "benchmark-production" / "vgg11.safetensors"
RESULTS = HERE / "results" / "vgg11.json"
DATA = HERE.parents[1] / "shared" / "data"
STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PLAN = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
HELD_BACK = {"n_calibration": 2000, "n_validation": 2000}
BATCH, RATE, DECAY, PAD = 128, 0.1, 5e-4, 4


def vgg11() -> nn.Module:
    """For pictures [N, 3, 32, 32], ten classes."""
    layers: list[nn.Module] = []
    wide = 3
    for item in PLAN:
        if item == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            n = int(item)
            layers += [nn.Conv2d(wide, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
            wide = n
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(wide, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = vgg11().to(memory_format=torch.channels_last)
    images, labels = (np.load(DATA / f"cifar10_jpeg_train_{k}.npy") for k in ("images", "labels"))
    rows = cut(len(images), **HELD_BACK, seed=0)["train"]
    x, y = normalised(images[rows]), torch.from_numpy(labels[rows].astype(np.int64))
    steps = args.epochs * (len(y) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.2)
    kept, first, seconds = WEIGHTS.with_suffix(".pt"), 0, 0.0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, seconds = state["epoch"], state["seconds"]
    kept.parent.mkdir(parents=True, exist_ok=True)
    for epoch in range(first, args.epochs):
        started = time.monotonic()
        loss = trained(model, x, y, optimizer, schedule, torch.Generator().manual_seed(epoch))
        seconds += time.monotonic() - started
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        torch.save({**{k: v.state_dict() for k, v in parts.items()}, "epoch": epoch + 1, "seconds": seconds}, kept)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {seconds:.0f} s", flush=True)
    accuracy = scored(model.eval())
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, WEIGHTS)
    figures = {"epochs": args.epochs, "images": len(y), "test_accuracy": accuracy, "seconds": round(seconds)}
    figures |= {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    write_whole(RESULTS, json.dumps(figures, indent=1) + "\n")
    print(figures)


def normalised(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] as float32 [N, C, H, W], channels last."""
    mean, std = (np.asarray(STATISTICS[k], dtype=np.float32) for k in ("mean", "std"))
    return torch.from_numpy((images.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)


def trained(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    draws: torch.Generator,
) -> float:
    """One epoch; the mean loss."""
    model.train()
    losses = []
    for rows in torch.randperm(len(y), generator=draws).split(BATCH):
        if len(rows) < BATCH:
            break
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(augmented(x[rows], draws)), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def augmented(x: Tensor, draws: torch.Generator) -> Tensor:
    """One random crop of the padded pictures for the whole batch, half of them flipped."""
    top, left = torch.randint(0, 2 * PAD + 1, (2,), generator=draws).tolist()
    size = x.shape[-1]
    x = nn.functional.pad(x, [PAD] * 4)[..., top : top + size, left : left + size]
    flip = torch.rand(len(x), generator=draws) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(-1), x).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def scored(model: nn.Module) -> float:
    """Accuracy on the 10 000 test images, in float32."""
    images, labels = (np.load(DATA / f"cifar10_jpeg_test_{k}.npy") for k in ("images", "labels"))
    parts = (model(normalised(images[i : i + 500])).argmax(1).numpy() for i in range(0, len(images), 500))
    return float((np.concatenate(list(parts)) == labels).mean())


if __name__ == "__main__":
    main()
