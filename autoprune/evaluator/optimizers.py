"""Which optimizer a course trains with: the one that suits the model, any of torch's by its name, or a user's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoprune import plugins
from autoprune.errors import AutopruneError, InputError, did_you_mean, one_line

USUAL: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "adamw": {"weight_decay": 0.01},
}
"""What is set unless the options say otherwise; others keep torch's own defaults."""
RATES = {"sgd": 0.02, "adamw": 1e-3}
UNFIT = {
    "lbfgs": "evaluates the loss several times a step",
    "sparseadam": "takes sparse gradients only",
}
RATE = "lr"


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer by its name, whatever the case of its letters, or a "module:factory", and its options.

    Without a name it is SGD with Nesterov momentum for models with batch norms, else AdamW. A factory is called with
    the parameters and `lr=`, and the options.

    Raises:
        InputError: there is no such optimizer, or it does not take these options or their values.
    """

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.name is None:
            if self.options:
                raise InputError(f"optimizer_options {dict(self.options)} want the optimizer by name: optimizer: sgd")
        elif ":" in self.name:
            if not callable(plugins.load_object(self.name)):
                raise InputError(f"optimizer {self.name!r} must be a function (parameters, lr) -> Optimizer of torch")
        else:
            self._check_options(_found(self.name))

    def usual_rate(self, convolutional: bool) -> float:
        """The peak learning rate where none is known; `convolutional`: the model has batch norms."""
        name = self._name(convolutional)
        if ":" in name:
            return RATES["adamw"]
        default = inspect.signature(_found(name)).parameters[RATE].default
        return RATES.get(name, default if isinstance(default, float) else RATES["adamw"])

    def build(self, model: nn.Module, convolutional: bool, rate: float | None) -> Optimizer:
        """The optimizer of all parameters of `model`.

        Raises:
            InputError: it refuses them, or a factory fails or returns something else.
        """
        rate = self.usual_rate(convolutional) if rate is None else rate
        return self._made(self._name(convolutional), list(model.parameters()), rate)

    def _name(self, convolutional: bool) -> str:
        if self.name is None:
            return "sgd" if convolutional else "adamw"
        return self.name if ":" in self.name else self.name.lower()

    def _settings(self, name: str) -> dict[str, Any]:
        own = dict(self.options)
        if self.weight_decay is not None:
            own["weight_decay"] = self.weight_decay
        settings = {**USUAL.get(name, {}), **own}
        if not settings.get("momentum", True) and "nesterov" not in own:
            settings.pop("nesterov", None)  # there is none without momentum
        return settings

    def _check_options(self, kind: type[Optimizer]) -> None:
        """What its signature does not have, and what it refuses before it has seen a model."""
        assert self.name is not None
        if RATE in self.options:
            raise InputError("optimizer_options: lr is learning_rate of the recovery")
        plugins.check_options(kind, self.options, 1, "optimizer_options")
        if self.weight_decay is not None and "weight_decay" not in inspect.signature(kind).parameters:
            raise InputError(f"optimizer {self.name} takes no weight_decay")
        self._made(self.name.lower(), [nn.Parameter(torch.zeros(2, 2))], self.usual_rate(True))

    def _made(self, name: str, parameters: list[nn.Parameter], rate: float) -> Optimizer:
        make: Any = plugins.load_object(name) if ":" in name else _found(name)
        with refused(f"optimizer {name}"):
            made = make(parameters, lr=rate, **self._settings(name))
        if not isinstance(made, Optimizer):
            raise InputError(f"optimizer {name} gives a {type(made).__name__}, not a torch.optim.Optimizer")
        return made


@contextmanager
def refused(what: str) -> Iterator[None]:
    """What torch, or a user's function, says of its arguments in one line that names it.

    Raises:
        InputError: it failed.
    """
    try:
        yield
    except AutopruneError:
        raise
    except Exception as error:  # a user's function may fail in any way
        raise InputError(f"{what} fails: {one_line(error)}") from error


def known() -> dict[str, type[Optimizer]]:
    """Optimizers of torch by their names in small letters."""
    kinds = (v for v in vars(torch.optim).values() if isinstance(v, type) and issubclass(v, Optimizer))
    return {kind.__name__.lower(): kind for kind in kinds if kind is not Optimizer}


def _found(name: str) -> type[Optimizer]:
    kinds = known()
    if (why := UNFIT.get(name.lower())) is not None:
        raise InputError(f"optimizer {name!r} {why}, which a course does not; allowed: {_fit(kinds)}")
    if name.lower() not in kinds:
        fit = [kind for kind in kinds if kind not in UNFIT]
        raise InputError(f"unknown optimizer {name!r}; {did_you_mean(name.lower(), fit)}, or 'module:factory'")
    return kinds[name.lower()]


def _fit(kinds: Mapping[str, type[Optimizer]]) -> str:
    return ", ".join(sorted(kind for kind in kinds if kind not in UNFIT))
