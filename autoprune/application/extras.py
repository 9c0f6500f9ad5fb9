"""What `apply` writes beside the model: exports, the 8-bit file, the folder of a container; each by itself."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune import plugins
from autoprune.application.hugging_face import copy_tokenizer, read_back
from autoprune.application.int8 import OnnxModel, Quantised, quantise
from autoprune.application.int8_speed import slow_words
from autoprune.application.order import Order
from autoprune.application.sources import Source
from autoprune.application.timed import file_latency
from autoprune.database.batches import prepare
from autoprune.errors import AutopruneError, root_line
from autoprune.exports import export
from autoprune.front import Point
from autoprune.protocols import Batch, Task
from autoprune.structure import Structure

ONNX = "model.onnx"


def write_extras(
    point: Point, source: Source, model: nn.Module, order: Order, draft: Path
) -> tuple[dict[str, Any], list[str]]:
    """Write all that was ordered into `draft`: what apply.json says of it, and a line for each that failed.

    The model is there by then, and a training may have taken hours: what fails costs itself alone.
    """
    facts, failed = dict[str, Any](), list[str]()

    def tried(write: Callable[[], Any]) -> None:
        try:
            facts.update(write() or {})
        except AutopruneError as error:
            failed.append(str(error))

    for name in order.export:
        tried(partial(_exported, name, source, model, draft))
    if order.int8 and (draft / ONNX).is_file():
        chosen = any(group.kind == "bits" for group in point.base.groups)
        tried(lambda: {"int8": _int8(source, model, draft, chosen)})
    if order.deploy is not None:
        tried(lambda: _contained(point, source, model, str(order.deploy), draft))
    return facts, failed


def _exported(name: str, source: Source, model: nn.Module, draft: Path) -> None:
    export(model, source.inputs, [name], draft)


@dataclass(frozen=True)
class TestSplit:
    """The test split of a task at every pass anew: as a whole it may not fit into memory."""

    __test__ = False  # it is no test of pytest's
    task: Task

    def __iter__(self) -> Iterator[Batch]:
        return (prepare(batch, torch.device("cpu")) for batch in self.task.split("test"))


def _int8(source: Source, model: nn.Module, draft: Path, chosen: bool) -> dict[str, Any]:
    """Quantise the ONNX file, score and time it."""
    assert source.task is not None
    quantised = quantise(draft / ONNX, model, source.task, source.inputs, chosen=chosen)
    return _int8_figures(quantised, draft / ONNX, source, model)


def _int8_figures(quantised: Quantised, exported: Path, source: Source, model: nn.Module) -> dict[str, Any]:
    """Scores of the 8-bit file on the test split, its size, and its latency over that of the float file."""
    assert source.task is not None
    timed = file_latency(exported, quantised.path, model, source.inputs, source.batch_size, source.threads)
    found: dict[str, Any] = {"way": quantised.way, "bytes": quantised.path.stat().st_size, "latency": timed}
    if timed["ratio"] >= 1.0:
        found["reason"] = why = slow_words(quantised.path)
        said = f"{quantised.path.name} takes {timed['ratio']:.2f} of the float file's time here: {why}"
        warnings.warn(said, stacklevel=2)
    try:
        scores = dict(source.task.metrics(OnnxModel(quantised.path, model, source.inputs), TestSplit(source.task)))
    except Exception as error:  # a task may want more of a model than its outputs
        return {**found, "test": None, "unscored": root_line(error, 160)}
    return {**found, "test": scores}


def _contained(point: Point, source: Source, model: nn.Module, deploy: str, draft: Path) -> None:
    """The folder of a container that is written, read back and compared; none where there is nothing to write.

    The tokenizer's files lie in it before. One that fails leaves nothing.
    """
    container: Any = plugins.load("deploy", deploy)()
    if not hasattr(container, "write"):
        return
    folder = draft / deploy.replace(":", ".")
    folder.mkdir()
    try:
        copy_tokenizer(folder, source.folder)
        container.write(model, Structure(point.base.groups, ()), point.policy, folder)
        getattr(container, "read_back", read_back)(folder, model, source.inputs)
    except AutopruneError:
        shutil.rmtree(folder)
        raise
