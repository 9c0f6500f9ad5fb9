"""Prune a small BERT and train it with the Trainer of transformers. usage: python examples/hf_trainer.py [FOLDER]."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import autoprune

JOB = {
    "budget": {"macs": [0.3, 0.9], "at": [0.4]},
    "search": {"trials": 12},
    "evaluator": {"calibration": 256, "validation": 128, "finalists": 1, "fitness": "refit"},
}
WORDS, LENGTH = 50, 16


def model() -> nn.Module:
    """A BERT of random weights, so that nothing is downloaded; from_pretrained gives you yours."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=4, **sizes)
    return BertForSequenceClassification(config).eval()


def samples(n: int, seed: int) -> list[dict[str, Any]]:
    """Sentences whose class is how many of the words 1, 2 and 3 are in them."""
    ids = torch.randint(WORDS, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": torch.unique(row[(row > 0) & (row < 4)]).numel()} for row in ids]


def batches(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The same as autoprune reads them: (inputs, targets)."""
    ids, targets = torch.stack([row["input_ids"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    return [({"input_ids": x}, y) for x, y in zip(ids.split(32), targets.split(32), strict=True)]


def trained(net: nn.Module, rows: list[dict[str, Any]], steps: int, folder: Path) -> None:
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=3e-3, **quiet)
    Trainer(net, arguments, train_dataset=rows).train()


def loss(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, targets)


def accuracy(outputs: Any, targets: Tensor) -> Mapping[str, float]:
    return {"accuracy": float((outputs.logits.argmax(-1) == targets).float().mean())}


def main(folder: Path) -> None:
    rows = {name: samples(1024, seed) for seed, name in enumerate(("train", "calibration", "validation", "test"))}
    dense = model()
    trained(dense, rows["train"], 250, folder / "trainer")
    task = autoprune.task(dense, {name: batches(found) for name, found in rows.items()}, loss, accuracy)
    front = autoprune.search(JOB, task=task, out=folder / "run").front
    small = autoprune.apply(front.select(macs=0.4), dense, task.example_inputs(), task=task, finetune="none")
    before = task.metrics(small.eval(), task.split("test"))["accuracy"]
    trained(small, rows["train"], 100, folder / "trainer")
    after = task.metrics(small.eval(), task.split("test"))["accuracy"]
    autoprune.save(small, folder / "small")  # with its config.json: autoprune.load needs no other file
    print(f"heads and neurons at 40 % of the MACs: test accuracy {before:.3f} as cut, {after:.3f} after the Trainer")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/hf_trainer"))
