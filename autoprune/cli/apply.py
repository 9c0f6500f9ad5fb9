"""`autoprune apply`: the smaller model of a point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoprune.cli.asked import load_job, words
from autoprune.cli.options import (
    EXPORT_HELP,
    AtOption,
    CriterionOption,
    DeployOption,
    FinetuneOption,
    Int8Flag,
    JsonFlag,
    ModelOption,
    RecoveryOption,
    TaskOption,
    TransferFlag,
    WeightsOption,
)
from autoprune.cli.progress import follow
from autoprune.cli.tables import console, print_applied, shown
from autoprune.errors import InputError


def apply(  # noqa: PLR0913  # the options of the command line
    policy: Annotated[Path, typer.Argument(metavar="POLICY.json", help="A front that search wrote.")],
    at: AtOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write; a folder a point for several.")],
    task: TaskOption = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    finetune: FinetuneOption = None,
    finetune_epochs: Annotated[float | None, typer.Option(help="Epochs of --finetune full, which they imply.")] = None,
    recovery: RecoveryOption = None,
    criterion: CriterionOption = None,
    export: Annotated[str, typer.Option(help=EXPORT_HELP)] = "",
    int8: Int8Flag = False,
    deploy: DeployOption = None,
    transfer: TransferFlag = False,
    json_: JsonFlag = False,
) -> dict[str, Any] | None:
    """Prune the model as a point of a front says, repair, train as the point was, verify and save it.

    The folder stands alone: weights, policy, exports and a model card. What the same command has finished is kept.
    """
    from autoprune.application.training import Training

    training = Training.of(finetune, finetune_epochs, recovery)
    if (task is None) == (model is None):
        raise InputError("say what to prune: --task JOB.yaml with data, or --model MODEL without; one of the two")
    source = model if task is None else load_job(task, None)
    assert source is not None

    from autoprune.application.order import Order
    from autoprune.application.under_way import UnderWay

    order = Order(weights, training, criterion, words(export), int8, deploy, transfer)
    call = UnderWay(policy, source, at, out, order)
    follow(call, call, console(json_))
    return call.report if json_ else shown(print_applied, call.report)
