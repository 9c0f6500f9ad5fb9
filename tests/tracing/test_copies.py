"""Private copies of what people have: just trained, compiled, wrapped, or closed, which is one clear line."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoprune.errors import InputError
from autoprune.tracing.analyze import analyze
from autoprune.tracing.copies import copied, private_copy
from autoprune.tracing.slim import slim
from autoprune.tracing.verify import verify

X = (torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


class Remembers(nn.Module):
    """Keeps what it last computed, as attention maps and auxiliary losses are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = net(), {"last": [torch.zeros(1)]}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        self.seen = {"last": [y]}
        return y


def test_a_model_just_trained_is_copied() -> None:
    model = Remembers()
    model(*X).sum().backward()
    twin = copied(model)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert model.seen["last"][0].grad_fn is not None
    assert analyze(model, X).names == ("net.0",)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_keep_their_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(net())
    (name,) = analyze(model, X).names
    assert name in ("module.0", "_orig_mod.0")
    assert torch.allclose(private_copy(model)(*X), net()(*X))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LazyLinear(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script: nn.Module = torch.jit.script(net())
    return script


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (scripted, "the model is TorchScript .* use the plain nn.Module"),
        (lambda: nn.Sequential(scripted(), nn.Linear(3, 2)), "the module '0' is TorchScript"),
        (Lazy, "'first' is lazy and was never run: run the model once"),
    ],
)
def test_a_closed_model_is_one_clear_line(build: Callable[[], nn.Module], words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
    with pytest.raises(InputError, match=words) as caught:
        analyze(model, X)
    assert "\n" not in str(caught.value)


def test_a_distributed_wrapper_says_what_to_pass() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(InputError, match="DistributedDataParallel: pass the model inside"):
            analyze(model, X)
    finally:
        dist.destroy_process_group()


def test_reentrant_checkpoints_pass_the_verification() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inner, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(checkpoint(self.inner, self.a(x).relu(), use_reentrant=True).relu())
            return y

    model = Checkpointed().eval()
    structure = analyze(model, X)
    keep = {g.name: tuple(range(g.width // 2)) for g in structure}
    small = private_copy(model)
    slim(small, structure, keep)
    assert verify(small, model, structure, keep, X) <= 1e-5
