"""The runtimes that latency is measured on: a model and its inputs become a function that runs them once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.errors import InputError, one_line
from autoprune.latency.onnx_models import OnnxFamily
from autoprune.latency.timing import Clock, Runner, clock_of

Loader = Callable[[nn.Module], Runner]
RuntimeName = Literal["onnxruntime", "eager", "compile"]
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
COMPILED = 4096
"""Models that dynamo may hold at a time; beyond its own limit it would run them uncompiled, without a word."""


@dataclass(frozen=True)
class Runtime:
    """`name` runs models on `device`, one thread; onnxruntime always on the CPU."""

    name: RuntimeName
    device: torch.device

    @property
    def clock(self) -> Clock:
        """What times a run."""
        return clock_of(self.device.type)

    def loader(self, dense: nn.Module, inputs: Sequence[Any]) -> Loader:
        """What makes runners, on `inputs`, of `dense` and of slim copies of it; all on this runtime's device.

        A model must stay as it is while its runner is used. The loader raises InputError for a model that the runtime
        does not take.
        """
        load = partial(self._torch, inputs=inputs) if self.name != "onnxruntime" else OnnxFamily(dense, inputs).load

        def checked(model: nn.Module) -> Runner:
            try:
                return load(model)
            except Exception as error:  # exporters and compilers fail in many ways; each means not this model, not here
                hint = "set latency.runtime: eager" if self.name != "eager" else "latency needs a model that runs"
                message = f"latency.runtime: {self.name} cannot run this model ({one_line(error, 200)}); {hint}"
                raise InputError(message) from error

        return checked

    def _torch(self, model: nn.Module, inputs: Sequence[Any]) -> Runner:
        if self.name == "eager":
            run = torch_runner(model, inputs, self.device)
            run()
            return run
        import torch._dynamo

        run = torch_runner(torch.compile(model, dynamic=False), inputs, self.device)
        with torch._dynamo.config.patch(recompile_limit=COMPILED, accumulated_recompile_limit=COMPILED):
            run()
        return run


def resolve(runtime: str, device: torch.device) -> Runtime:
    """The runtime called `runtime`; auto is onnxruntime on a CPU where the extra is installed, else eager.

    Raises:
        InputError: an unknown name, or onnxruntime without the extra.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if runtime == "auto":
        runtime = "eager" if missing or device.type != "cpu" else "onnxruntime"
    if runtime == "onnxruntime":
        if missing:
            raise InputError(f"latency.runtime: onnxruntime needs {', '.join(missing)}: pip install 'autoprune[onnx]'")
        return Runtime("onnxruntime", torch.device("cpu"))
    if runtime == "eager":
        return Runtime("eager", device)
    if runtime == "compile":
        return Runtime("compile", device)
    raise InputError(f"latency.runtime must be auto, onnxruntime, eager or compile, not {runtime!r}")


def torch_runner(model: Callable[..., Any], inputs: Sequence[Any], device: torch.device) -> Runner:
    """One call without gradients, then wait for the device."""
    wait = _waiting(device)

    def run() -> None:
        with torch.inference_mode():
            model(*inputs)
        wait()

    return run


def batched(inputs: Sequence[Any], batch_size: int, device: torch.device) -> tuple[Any, ...]:
    """The example inputs repeated or cut to `batch_size` samples, on `device`."""
    tensors = [x for x in tree_leaves(tuple(inputs)) if isinstance(x, Tensor) and x.dim()]
    if not tensors:
        raise InputError("latency needs example inputs with a tensor whose dimension 0 is the sample")
    given = tensors[0].shape[0]

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() and value.shape[0] == given:
            value = value.repeat(-(-batch_size // given), *(1 for _ in value.shape[1:]))[:batch_size]
        return value.detach().to(device).contiguous()

    return tuple(tree_map(fit, tuple(inputs)))


def _waiting(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None
