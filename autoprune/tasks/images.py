"""Task `images`: uint8 pictures in .npy files, a model factory and safetensors weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.protocols import Batch, Direction
from autoprune.tasks._arrays import DIRECTIONS, Batches, Normalised, accuracies, cut, pick
from autoprune.tasks._weights import load_weights


class Images:
    """Classification of uint8 pictures [N, H, W, C] or [N, H, W]; (x / 255 - mean) / std goes into the model.

    Calibration, validation and train are cut from the train files, disjoint and seeded; test stands apart.
    """

    def __init__(  # noqa: PLR0913  # the keys of the job file
        self,
        model: str,
        weights: Path,
        train_images: Path,
        train_labels: Path,
        test_images: Path,
        test_labels: Path,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        n_calibration: int | None = None,
        n_validation: int | None = None,
        seed: int = 0,
    ) -> None:
        self._factory, self._weights = model, Path(weights)
        train = _load_pair(Path(train_images), Path(train_labels))
        test = _load_pair(Path(test_images), Path(test_labels))
        norm = _check_norm(mean, std, train[0].shape[-1])
        parts = cut(len(train[0]), n_calibration, n_validation, seed)
        self._splits = {name: _batches(train, rows, norm) for name, rows in parts.items()}
        self._splits["test"] = _batches(test, np.arange(len(test[0])), norm)
        self.build()  # wrong weights must not wait for the search

    @property
    def directions(self) -> Mapping[str, Direction]:
        return DIRECTIONS

    def build(self) -> nn.Module:
        factory = plugins.load_object(self._factory)
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, then overwritten: leave no trace of it
            model = factory()
        if not isinstance(model, nn.Module):
            raise InputError(f"model {self._factory!r} returned a {type(model).__name__}, not a torch.nn.Module")
        load_weights(model, self._weights)
        return model.eval()

    def example_inputs(self) -> tuple[Tensor, ...]:
        inputs, _ = next(iter(self._splits["calibration"]))
        return (inputs[:2].clone(),)

    def split(self, name: str) -> Iterable[Batch]:
        return pick(self._splits, name)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1])

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        return accuracies(model, batches)


def _load_pair(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [N, H, W, C] uint8 (memory-mapped) and labels [N]."""
    x, y = _load(images), _load(labels)
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4:
        raise InputError(f"{images}: must be uint8 [N, H, W, C] or [N, H, W], not {x.dtype} {list(x.shape)}")
    if y.ndim != 1 or len(y) != len(x) or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"{labels}: must hold {len(x)} integer labels, not {y.dtype} {list(y.shape)}")
    if len(x) < 2:
        raise InputError(f"{images}: needs at least 2 pictures, not {len(x)}")
    return x, y


def _load(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"no data file {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not a whole .npy file: {error}") from error
    return array


def _check_norm(mean: Sequence[float], std: Sequence[float], channels: int) -> Normalised:
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise InputError(f"mean and std need 1 or {channels} values (std above 0), not {list(mean)} and {list(std)}")
    return Normalised(torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32))


def _batches(pair: tuple[np.ndarray, np.ndarray], rows: np.ndarray, ready: Normalised) -> Batches:
    return Batches(pair[0], rows, torch.from_numpy(np.array(pair[1][rows], dtype=np.int64)), ready)
