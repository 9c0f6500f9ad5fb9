"""One analysis a run: it is kept beside the level database, and found there by whoever needs it again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune import families, plugins, structure, tracing
from autoprune.errors import RunError
from autoprune.files.structure_file import load_structure, save_structure
from autoprune.structure import Structure
from autoprune.tracing.analyze import Analysis
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.inputs import described

PREFIX = "analysis-"
PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Kept:
    """An analysis, where it belongs, and the fingerprint of the weights."""

    analysis: Analysis
    path: Path
    key: str
    weights: str

    def keep(self) -> None:
        """Write it there; nothing where it is there."""
        if not self.path.exists() or self.analysis.passes:
            with suppress(RunError):  # a disk that is full is told where it matters
                save_structure(self.path, self.key, self.analysis.structure)


def kept_analysis(model: nn.Module, example_inputs: Any, kinds: Sequence[str], folder: Path) -> Kept:
    """The analysis of `model` from `folder`, or made now; `kinds` are those of the space.

    A file of another model, of other inputs, kinds or version, or one that cannot be read, does not count. What took
    long is kept at once, so that a call that goes wrong later is no loss; what did not waits for `Kept.keep`, lest a
    job that is refused leaves a folder.

    Raises:
        InputError: as `analyze`.
    """
    weights = weights_fingerprint(model)
    key = analysis_key(model, example_inputs, kinds, weights)
    found = load_structure(_file(folder, key), key)
    if found is not None:
        return Kept(Analysis(found, 0, (), 0.0), _file(folder, key), key, weights)
    made = Kept(families.analysed(model, example_inputs, kinds=kinds), _file(folder, key), key, weights)
    if made.analysis.said:
        made.keep()
    return made


def found_analysis(model: nn.Module, example_inputs: Any, folder: Path) -> Structure | None:
    """What `kept_analysis` left in `folder` for this model and these inputs, for whatever kinds."""
    found = folder.glob(f"{PREFIX}{_seen(model, example_inputs, weights_fingerprint(model))}-*.json")
    kept = (load_structure(path, path.stem.removeprefix(PREFIX)) for path in sorted(found))
    return next(filter(None, kept), None)


def analysis_key(model: nn.Module, example_inputs: Any, kinds: Sequence[str], weights: str) -> str:
    """Hex digits of all that decides what `analyze` finds, then of the kinds."""
    return f"{_seen(model, example_inputs, weights)}-{hashlib.sha256(repr(sorted(kinds)).encode()).hexdigest()[:8]}"


def _file(folder: Path, key: str) -> Path:
    return folder / f"{PREFIX}{key}.json"


def _seen(model: nn.Module, example_inputs: Any, weights: str) -> str:
    leaves = [x for x in tree_leaves(example_inputs) if not isinstance(x, Tensor)]
    plain = [repr(x) for x in leaves if isinstance(x, PLAIN)]
    what = (_version(), weights, list(_modules(model)), described(example_inputs), plain)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


@cache
def _version() -> str:
    """What the analysis itself depends on: its source, and the libraries that trace."""
    files = [path for room in (tracing, families) for path in sorted(Path(next(iter(room.__path__))).glob("*.py"))]
    sources = [path.read_bytes() for path in (*files, Path(str(structure.__file__)))]
    libraries = [f"{name} {metadata.version(name)}" for name in ("torch", "torch-pruning")]
    return hashlib.sha256(b"".join([*sources, repr(libraries).encode()])).hexdigest()


def _modules(model: nn.Module) -> Iterator[Any]:
    """What a forward depends on beside tensors: classes and their source, plain attributes, functions by name."""
    sources: dict[type, str] = {}
    kept = set(model.state_dict())
    for name, module in model.named_modules():
        kind = type(module)
        sources.setdefault(kind, "" if kind.__module__.startswith("torch.") else plugins.source_digest(kind))
        own = {k: _plain(v) for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        yield name, kind.__module__, kind.__qualname__, sources[kind], sorted((k, v) for k, v in own.items() if v)
    for name, buffer in model.named_buffers():  # those that no state dict holds
        if name not in kept:
            yield name, tuple(buffer.shape), buffer.detach().cpu().flatten().tolist()


def _plain(value: object) -> str:
    if isinstance(value, PLAIN) or (isinstance(value, tuple | list) and all(isinstance(v, PLAIN) for v in value)):
        return repr(value)
    return str(getattr(value, "__qualname__", ""))
