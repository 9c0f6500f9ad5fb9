"""2:4 on a GPU: what can be told without one, and its products where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.latency.runtime_here import resolve
from autoprune.runtimes.semi_structured import SemiStructured, check_patterns

CUDA = torch.cuda.is_available()


def patterned(weight: torch.Tensor) -> torch.Tensor:
    """`weight` with the two smallest of every four inputs zero."""
    runs = weight.detach().unflatten(1, (-1, 4))
    return (runs * torch.zeros_like(runs).scatter_(-1, runs.abs().topk(2, -1).indices, 1.0)).flatten(1)


def model(half: bool = True) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    if half:
        with torch.no_grad():
            made[0].weight.copy_(patterned(made[0].weight))
    return made


def test_zeros_in_another_pattern_are_refused_with_the_layer_named() -> None:
    check_patterns(model(False))
    check_patterns(model())
    other = model()
    with torch.no_grad():
        other[2].weight[::2] = 0.0  # dead neurons
    check_patterns(other)
    with torch.no_grad():
        other[2].weight[1::4, :128] = 0.0
    with pytest.raises(RuntimeError, match=r"25% of 2's weights are zero, and not at least 2 of every 4 inputs"):
        check_patterns(other)


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"semi_structured runs on a CUDA GPU, and there is none here"):
        resolve("semi_structured", torch.device("cpu"))


@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (8, 0), reason="no GPU with sparse tensor cores")
def test_its_products_are_those_of_the_dense_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.sparse import SparseSemiStructuredTensor

    from autoprune.runtimes import semi_structured

    seen: list[nn.Module] = []
    real = semi_structured.torch_runner
    monkeypatch.setattr(semi_structured, "torch_runner", lambda m, i: (seen.append(m), real(m, i))[1])
    net, x = model().cuda(), torch.randn(64, 128, device="cuda")
    SemiStructured()(net, (x,), 1)()
    assert isinstance(seen[0][0].weight, SparseSemiStructuredTensor)  # type: ignore[index]
    with torch.inference_mode():
        torch.testing.assert_close(seen[0](x.half()).float(), net(x), rtol=2e-2, atol=2e-2)
