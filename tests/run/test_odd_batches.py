"""Models whose inputs and batches are odd go all the way: search, brief fine-tune, apply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune.protocols import SPLITS

JOB = {
    "budget": {"macs": [0.2, 0.95], "at": [0.6]},
    "search": {"trials": 3, "sampler": "random"},
    "evaluator": {"finalists": 1, "finetune_steps": 2},
}
CLASSES = 3


class Body(nn.Module):
    """Two layers that can be pruned; subclasses bring the inputs to [samples, 5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def scores(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))  # type: ignore[no-any-return]


class Keywords(Body):
    def forward(self, *, ids: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"logits": self.scores(ids + shift)}


class Images(Body):
    """A list of [5, H, W], of other sizes each."""

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.scores(torch.stack([image.mean((1, 2)) for image in images]))


class Graph(Body):
    """Nodes and edges, a class a node; a batch is one graph of its own size."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.scores(x + torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]]))


class Words(Body):
    """Sequences, of one length in a batch and another in the next; a class a word."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


def keywords(i: int, draw: Callable[..., Tensor]) -> tuple[Any, Any]:
    return {"ids": draw(16, 5), "shift": draw(16, 5)}, classes(draw(16))


def images(i: int, draw: Callable[..., Tensor]) -> tuple[Any, Any]:
    return [draw(5, 3 + j % 2, 4) for j in range(16)], classes(draw(16))


def graph(i: int, draw: Callable[..., Tensor]) -> tuple[Any, Any]:
    n = 7 + i
    return (draw(n, 5), torch.stack([torch.arange(n - 1), torch.arange(1, n)])), classes(draw(n))


def words(i: int, draw: Callable[..., Tensor]) -> tuple[Any, Any]:
    return draw(8, 4 + i, 5), classes(draw(8, 4 + i))


def classes(values: Tensor) -> Tensor:
    return (values > 0.4).long() + (values > -0.4).long()


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    return F.cross_entropy(logits.movedim(-1, 1) if logits.dim() > 2 else logits, targets)


def accuracy(outputs: Any, targets: Tensor) -> dict[str, float]:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    return {"accuracy": float((logits.argmax(-1) == targets).float().mean())}


@pytest.mark.filterwarnings("ignore:calibration batches differ in shape")
@pytest.mark.parametrize(
    ("model", "batch"),
    [(Keywords, keywords), (Images, images), (Graph, graph), (Words, words)],
    ids=["keywords", "images", "graph", "words"],
)
def test_it_is_searched_tuned_and_applied(model: type[Body], batch: Any, tmp_path: Path) -> None:
    loaders = {}
    for seed, name in enumerate(SPLITS):
        generator = torch.Generator().manual_seed(seed)
        loaders[name] = [batch(i, lambda *s, g=generator: torch.randn(s, generator=g)) for i in range(6)]
    task = autoprune.task(model().eval(), loaders, cross_entropy, accuracy)
    run = autoprune.search(JOB, task=task, out=tmp_path / "run").finish()
    assert {p.losses["validation"]["name"] for p in run.front} == {"kl"}
    point = next(p for p in run.front if "finetuned" in p.metrics)
    small = autoprune.apply(point, task.build(), task.example_inputs(), task=task)
    assert sum(p.numel() for p in small.parameters()) == point.costs["params"]
    whole = list(task.split("validation"))
    assert task.metrics(small, whole)["accuracy"] == pytest.approx(point.metrics["finetuned"]["accuracy"], abs=1e-4)


class Auxiliary(Body):
    """A second head, on the first layer, in training only: where nobody narrows it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Any:
        logits = self.scores(x)
        return (logits, self.other(F.relu(self.a(x)))) if self.training else logits


def test_a_head_that_is_there_in_training_only_does_not_end_the_search(tmp_path: Path) -> None:
    loaders = {}
    for seed, name in enumerate(SPLITS):
        x = torch.randn(32, 5, generator=torch.Generator().manual_seed(seed))
        loaders[name] = [(x, classes(x[:, 0]))]
    task = autoprune.task(Auxiliary().eval(), loaders, cross_entropy, accuracy)
    run = autoprune.search(JOB, task=task, out=tmp_path / "run").finish()
    small = autoprune.apply(run.front[0], task.build(), task.example_inputs(), task=task)
    assert sum(p.numel() for p in small.parameters()) == run.front[0].costs["params"]
