"""Options that verbs of the command line share, and what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune import plugins

TRIALS_HELP = (
    "Full evaluations that the search spends; the sensitivity table, the control arms and the finalists come on top. "
    "By default the job's search.trials, or 300."
)
STRATEGIES_HELP = (
    f"With commas, strategies: {', '.join(plugins.names('strategies'))}; samplers: "
    f"{', '.join(plugins.names('samplers'))}; or your own module:attribute. By default the job's compare.controls and "
    f"evolution."
)
FINETUNE_HELP = (
    "proxy repeats what trained the point in the search (nothing where nothing did), so that the model is what the "
    "front promises; none repairs only; full is the job's recovery. By default proxy."
)
MODEL_HELP = (
    "In place of --task: a Hugging Face folder, timm:NAME or module:factory; without data it is cut by shapes alone."
)
RECOVERY_HELP = (
    f"In place of the job's recovery: {', '.join(plugins.names('recovery'))}; or your own module:Class. Implies full."
)
TRANSFER_HELP = (
    "Carry the points over to a deeper or wider sibling of their model, by stage and relative depth, at the same ratio "
    "of the cost; approximate: the loss is shown beside the uniform policy's, and a search's in runs/<job's name>."
)
EXPORT_HELP = f"Also write, with commas: {', '.join(plugins.names('exports'))}; or your own module:Class."
JobPath = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job: --set search.trials=100; repeatable."),
]
OUT_HELP = "The folder to write to; runs/<job's name> by default, of a comparison runs/<job's name>-compare."
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help=OUT_HELP)]
WorkersOption = Annotated[int | None, typer.Option(help="Workers that evaluate side by side.")]
RayOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Evaluate on a Ray cluster: auto, host:port or local.")
]
TimeOption = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="A call, in compare each search, ends after 90s, 10m or 2h; a number is seconds."
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, progress on stderr.")]
AtOption = Annotated[list[str], typer.Option(help="macs=0.5, params=0.5, drop=0.01, knee or a point's id; repeatable.")]
TaskOption = Annotated[
    Path | None, typer.Option("--task", metavar="JOB.yaml", help="The job whose task gives model and data.")
]
ModelOption = Annotated[str | None, typer.Option(metavar="MODEL", help=MODEL_HELP)]
WeightsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Other weights: safetensors, or a plain checkpoint.")
]
FinetuneOption = Annotated[str | None, typer.Option(metavar="none|proxy|full", help=FINETUNE_HELP)]
RecoveryOption = Annotated[str | None, typer.Option(metavar="NAME", help=RECOVERY_HELP)]
CriterionOption = Annotated[
    str | None, typer.Option(metavar="MODULE:CLASS", help="Your own criterion, where atoms are ranked anew.")
]
Int8Flag = Annotated[bool, typer.Option("--int8", help="Also write model.int8.onnx, and score and time it.")]
TransferFlag = Annotated[bool, typer.Option("--transfer", help=TRANSFER_HELP)]
DeployOption = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"A container to fit: {', '.join(plugins.names('deploy'))}.")
]
