"""Torch on the CPU with sparse weights as CSR matrices (MKL), wherever that is faster than the dense layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.runtimes._csr import csr_twin, why_not
from autoprune.runtimes._torch import torch_runner
from autoprune.tracing.copies import sharing
from autoprune.tracing.eval_mode import evaluating, without_cache
from autoprune.tracing.inputs import call_model

LEAST_ZEROS = 0.5
"""Share of zeros from which a sparse product is tried at all: none with fewer was ever the faster one."""
WORTH = 0.95
"""Of the dense layer's time, which a sparse one must stay under: so that noise alone puts none in its place."""
CLOSE = 1e-4
"""How far outputs may be from the dense ones, of these and of the largest."""
ROUNDS, CALLS = 5, 3
BATCHED = 4
"""Dimensions of what a convolution in two dimensions takes, its samples among them."""


class SparseCsr:
    """Each linear layer and convolution with enough zeros is timed once, dense and sparse, and the faster one stays.

    So is the whole model in the end. Outputs are the dense model's up to rounding; one without zeros runs as eager.
    """

    device = "cpu"

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], object]:
        """Calls a twin of the model that shares its tensors; who measures has set torch's threads.

        Raises:
            RuntimeError: this build of torch multiplies no sparse matrices.
        """
        if not any(_candidate(module) for module in model.modules()):
            return torch_runner(model, inputs)
        if said := why_not():
            raise RuntimeError(f"this torch multiplies no sparse matrices: {said}")
        twin, clock = sharing(model), time.process_time if threads == 1 else time.perf_counter
        dense, chosen = torch_runner(model, inputs), {id(a): b for a, b in _faster(twin, inputs, clock)}
        if not chosen:
            return dense
        for parent in [*twin.modules()]:
            for name, child in parent._modules.items():
                if id(child) in chosen:
                    parent._modules[name] = chosen[id(child)]
        sparse = chosen.get(id(twin), twin)
        if not _same(sparse, model, inputs):
            return dense
        run = torch_runner(sparse, inputs)
        return run if _takes_less(run, dense, clock) else dense  # whole models may fuse what single layers do not

    def operation(self, module: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
        """A single layer is a model of one."""
        return self(module, (x,), threads)


def _same(sparse: nn.Module, dense: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether the sparse twin gives what the dense model gives: a forward may ask more of a layer than to be called."""
    try:
        found, wanted = (tree_leaves(_outputs(model, inputs)) for model in (sparse, dense))
    except Exception:  # whatever a forward does with its layers
        return False
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if isinstance(b, Tensor)]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=CLOSE, atol=CLOSE * _size(b)) for a, b in pairs)


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> object:
    with torch.inference_mode(), evaluating(model), without_cache(model):
        return call_model(model, inputs)


def _size(wanted: Tensor) -> float:
    return float(wanted.abs().max()) if wanted.numel() and wanted.is_floating_point() else 0.0


def _candidate(module: nn.Module) -> bool:
    """Whether a module is a layer with so many zeros that a sparse twin may be faster; nobody listens to it."""
    if type(module) not in (nn.Linear, nn.Conv2d) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return float((module.get_parameter("weight") == 0).float().mean()) >= LEAST_ZEROS


def _faster(model: nn.Module, inputs: tuple[Any, ...], clock: Callable[[], float]) -> list[tuple[nn.Module, nn.Module]]:
    """(layer, its sparse twin) wherever the twin takes less time on what the layer is called with in `model`."""
    layers = [module for module in model.modules() if _candidate(module)]
    seen: dict[nn.Module, list[Tensor | None]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        plain = bool(args) and (isinstance(module, nn.Linear) or args[0].dim() == BATCHED)
        seen.setdefault(module, []).append(torch.empty_like(args[0], device="meta") if plain else None)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with evaluating(model), without_cache(model):
            call_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer, calls in seen.items():
        given, sparse = [x for x in calls if x is not None], csr_twin(layer)
        if sparse is not None and len(given) == len(calls) and _pays(layer, sparse, given, clock):
            found.append((layer, sparse))
    return found


def _pays(layer: nn.Module, sparse: nn.Module, calls: list[Tensor], clock: Callable[[], float]) -> bool:
    """Whether the sparse twin takes less time than the layer, over all calls of a forward pass together."""
    draw = torch.Generator().manual_seed(0)
    given = [torch.empty_like(x, device="cpu").normal_(generator=draw) for x in calls]

    def runner(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                for x in given:
                    module(x)

        return run

    return _takes_less(runner(sparse), runner(layer), clock)


def _takes_less(one: Callable[[], object], other: Callable[[], object], clock: Callable[[], float]) -> bool:
    """Whether the least time of `one` is below that of `other`, in turns, by more than noise."""
    least = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for i, run in enumerate((one, other)):
            for _ in range(CALLS):
                start = clock()
                run()
                least[i] = min(least[i], clock() - start)
    return least[0] < WORTH * least[1]
