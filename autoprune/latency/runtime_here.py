"""The runtime that latency is measured on, found by its name, with the device and the clock that go with it."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune import plugins
from autoprune.errors import InputError, root_line
from autoprune.files.machine import usable_cores
from autoprune.latency.timing import Clock, Runner, clock_of
from autoprune.protocols import Runtime


@dataclass(frozen=True)
class RuntimeHere:
    """The runtime called `name`, which runs models on `threads` of `device`; `make` has met what it was shown."""

    name: str
    device: torch.device
    make: Runtime
    threads: int = 1

    @property
    def clock(self) -> Clock:
        """What times a run."""
        return clock_of(self.device.type, self.threads)

    @property
    def step(self) -> int:
        """Channels in which the time of a convolution grows here; 1 where the runtime says nothing."""
        with plugins.before_work(), plugins.calling("runtimes", self.name, "asked for its step"):
            step: object = getattr(self.make, "step", 1)
        if isinstance(step, int) and not isinstance(step, bool) and step >= 1:
            return step
        raise InputError(f"latency.runtime: {self.name} has the step {step!r}; it must be a whole number from 1")

    @property
    def version(self) -> str:
        """What its figures depend on beside the model and the machine: the packages that it runs on and its source."""
        packages = ("torch", *getattr(self.make, "packages", ()))
        found = [f"{package} {metadata.version(package)}" for package in packages]
        source = plugins.source_digest(plugins.load("runtimes", self.name))
        return ", ".join([*found, f"source {source}"])

    def load(self, model: nn.Module, inputs: tuple[Any, ...]) -> Runner:
        """What runs `model` on `inputs`, both on this runtime's device; it has run once.

        A model must stay as it is while its runner is used, and the first one that is loaded is the dense one.

        Raises:
            InputError: the runtime does not take the model.
        """
        try:
            run = self.make(model, inputs, self.threads)
            run()
        except Exception as error:  # exporters and compilers fail in many ways; each means not this model, not here
            hint = "set latency.runtime: eager" if self.name != "eager" else "latency needs a model that runs"
            message = f"latency.runtime: {self.name} cannot run this model ({root_line(error, 200)}); {hint}"
            raise InputError(message) from error
        return run

    def load_operation(self, module: nn.Module, x: Tensor) -> Runner:
        """What runs a single operation: the runtime's own way, else eagerly, which a fit then weighs."""
        load: Callable[..., Runner] = getattr(self.make, "operation", None) or _instance("eager")
        return load(module, x if hasattr(self.make, "operation") else (x,), self.threads)


def resolve(name: str, device: torch.device, threads: int = 1) -> RuntimeHere:
    """The runtime called `name`, a file of autoprune/runtimes or a user's "module:attribute", on so many threads.

    "auto" is onnxruntime on a CPU where its packages are installed, else eager.

    Raises:
        InputError: an unknown name, a package or a device of it that is not here, or more threads than cores.
    """
    check_threads(threads)
    if name == "auto":
        missing = _missing(_instance("onnxruntime"))
        name = "eager" if missing or device.type != "cpu" else "onnxruntime"
    made = _instance(name)
    if missing := _missing(made):
        extra = getattr(made, "extra", "onnx")
        raise InputError(f"latency.runtime: {name} needs {', '.join(missing)}: pip install 'autoprune[{extra}]'")
    own = getattr(made, "device", None)
    if own is not None and torch.device(own).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"latency.runtime: {name} runs on a CUDA GPU, and there is none here; take another runtime")
    return RuntimeHere(name, device if own is None else torch.device(own), made, threads)


def check_threads(threads: int) -> None:
    """InputError where there are fewer cores than `threads`."""
    if threads > (cores := usable_cores()):
        many = "1 core" if cores == 1 else f"{cores} cores"
        raise InputError(
            f"latency.threads: {threads} threads, but this process may use {many} here: take {cores} or fewer"
        )


def device_name(device: torch.device) -> str:
    """What figures on `device` belong to, in words: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if found:
            return found[0]
    return platform.processor() or platform.machine()


def _instance(name: str) -> Runtime:
    found = plugins.load("runtimes", name)
    with plugins.before_work(), plugins.calling("runtimes", name):
        made: Runtime = found() if isinstance(found, type) else found
    return made


def _missing(made: Runtime) -> list[str]:
    return [package for package in getattr(made, "packages", ()) if importlib.util.find_spec(package) is None]


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
