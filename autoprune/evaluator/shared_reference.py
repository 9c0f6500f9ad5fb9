"""The dense model's targets on many statistics samples: in files beside the samples, once a machine, memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autoprune.evaluator.dense_reference import Reference
from autoprune.evaluator.precision import Precision
from autoprune.files.whole import whole
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.wiring import Site

NORMS = "norms"


class TargetFiles:
    """The files of one dense pass over batches of these `sizes`; another model, precision or cut has others."""

    def __init__(
        self, folder: Path, model: nn.Module, sites: Mapping[str, Site], sizes: Sequence[int], precision: Precision
    ) -> None:
        what = (weights_fingerprint(model), sorted(sites.items()), tuple(sizes), precision, torch.__version__)
        self._folder, self._count = folder, len(sizes)
        self._key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]

    def keep(self, number: int, reference: Reference) -> Reference:
        """The reference of one batch with its targets in a file; its outputs are not kept."""
        path = self._path(str(number))
        with whole(path) as draft:
            save_file({name: t.contiguous() for name, t in reference.targets.items()}, draft)
        return replace(reference, outputs=torch.empty(0), targets=load_file(path))

    def finish(self, references: Sequence[Reference]) -> None:
        """Note the moments of all batches: what others take as the sign that all is there."""
        moments = {f"{name}|{k}": pair[k] for name, pair in references[0].norms.items() for k in (0, 1)}
        with whole(self._path(NORMS)) as draft:
            save_file({"": torch.empty(0), **moments}, draft)

    def found(self) -> tuple[Reference, ...] | None:
        """What another process has left; None where it has not, or not all of it can be read."""
        try:
            moments = load_file(self._path(NORMS))
            targets = [load_file(self._path(str(i))) for i in range(self._count)]
        except (OSError, SafetensorError):
            return None
        names = {key.rpartition("|")[0] for key in moments if key}
        norms = {name: (moments[f"{name}|0"], moments[f"{name}|1"]) for name in names}
        return tuple(Reference(torch.empty(0), norms, t) for t in targets)

    def _path(self, part: str) -> Path:
        return self._folder / f"dense-{self._key}-{part}.safetensors"
