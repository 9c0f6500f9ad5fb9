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


class Closed(nn.Module):
    """`a` -> `b` -> `middle` -> `c` -> `d`; only `middle` is compiled, or nothing."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(3, 7), nn.Linear(7, 2)
        self.middle = scripted() if compiled else net()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.c(self.middle(self.b(self.a(x).relu()))).relu())
        return y


def test_torchscript_inside_a_model_freezes_what_it_touches_and_nothing_else() -> None:
    model = Closed(compiled=True)
    structure, plain = analyze(model, X), analyze(Closed(compiled=False), X)
    assert structure.names == ("a", "c")
    assert "it feeds 'middle': TorchScript is compiled" in structure.frozen["b"]
    assert "use the plain nn.Module" in structure.frozen["middle"]
    sizes = [{t.name: (t.shape, t.is_parameter) for op in s.ops for t in op.tensors} for s in (structure, plain)]
    assert sizes[0] == sizes[1]
    small = private_copy(model)
    keep = {"a": (0, 3, 5), "c": (1, 2)}
    slim(small, structure, keep)
    assert verify(small, model, structure, keep, X) < 1e-6


def test_a_copy_of_torchscript_trains_as_the_original_does() -> None:
    twin = copied(Closed(compiled=True))
    assert all(p.is_leaf and p.requires_grad and isinstance(p, nn.Parameter) for p in twin.parameters())
    before = [p.detach().clone() for p in twin.middle.parameters()]
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    twin(X[0]).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(b, p) for b, p in zip(before, twin.middle.parameters(), strict=True))


def test_copies_of_copies_of_a_compiled_model_run_uncompiled() -> None:
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.append(len(inputs))
        return graph.forward

    model = nn.Sequential(torch.compile(net(), backend=backend))
    twin = copied(copied(model))
    expected = net()(*X)
    assert torch.equal(twin(*X), expected)
    assert not seen, "nothing was compiled"
    assert torch.equal(model(*X), expected)
    assert seen, "the lent model still is"
