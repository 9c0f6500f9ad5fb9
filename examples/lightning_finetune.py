"""Train a pruned model with Lightning. usage: python examples/lightning_finetune.py RUN_DIR (a search of digits)."""

import sys
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autoprune
from autoprune.tasks.digits import Digits


class Student(lightning.LightningModule):
    """Any LightningModule takes a pruned model as it takes another; this one learns from the dense model too."""

    def __init__(self, small: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        self.small = small
        self.teach = dense.eval().requires_grad_(False).forward  # no module of the student: it is not trained or saved

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        outputs = self.small(inputs)
        return F.cross_entropy(outputs, targets) + F.cross_entropy(outputs, self.teach(inputs).softmax(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.small.parameters(), 1e-3)


def main(run_dir: Path) -> None:
    task = Digits()
    point, dense = autoprune.load_front(run_dir / "policy.json").select(macs=0.5), task.build()
    small = autoprune.apply(point, dense, task.example_inputs(), task=task, finetune="none")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", gradient_clip_val=1.0, **quiet)
    batches = DataLoader(list(task.split("train")), batch_size=None, shuffle=True)
    trainer.fit(Student(small.train(), dense), batches)
    autoprune.save(small, run_dir / "trained")
    score = task.metrics(small.eval(), task.split("test"))["accuracy"]
    print(f"{point.id}: test accuracy {score:.4f} after {trainer.global_step} steps of Lightning")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
