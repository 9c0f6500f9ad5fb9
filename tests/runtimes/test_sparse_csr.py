"""Sparse weights as CSR on the CPU: they answer as the dense model, where they are faster, and never elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.latency.runtime_here import resolve
from autoprune.runtimes import _csr, sparse_csr
from autoprune.runtimes._csr import CsrConv2d, CsrLinear, csr_twin
from autoprune.runtimes.sparse_csr import SparseCsr
from tests.transformer_models import MODELS

CPU = torch.device("cpu")


def thinned(model: nn.Module, density: float = 0.05) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.mul_(torch.rand(module.weight.shape, generator=draw) < density)
    return model.eval()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(24, 10), (5, 24)),
        (nn.Linear(24, 10, bias=False), (2, 3, 24)),
        (nn.Linear(24, 10), (24,)),
        (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 7, 9)),
        (nn.Conv2d(6, 10, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1), bias=False), (3, 6, 11, 9)),
        (nn.Conv2d(6, 10, 1), (2, 6, 7, 9)),
        (nn.Conv2d(6, 10, 1, stride=2), (1, 6, 7, 9)),
    ],
)
def test_a_twin_computes_what_its_layer_does(layer: nn.Module, shape: tuple[int, ...]) -> None:
    twin = csr_twin(thinned(layer, 0.3))
    assert twin is not None
    x = torch.randn(shape)
    with torch.inference_mode():
        for given in (x, x.to(memory_format=torch.channels_last) if x.dim() == 4 else x):
            wanted, got = layer(given), twin(given)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            assert got.is_contiguous(memory_format=torch.contiguous_format if given is x else torch.channels_last)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Conv2d(6, 6, 3, padding="same"),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(6, 6, 3),
        nn.Linear(6, 6).to(torch.bfloat16),
        nn.ConvTranspose2d(6, 6, 3),
    ],
)
def test_what_has_no_twin_stays_dense(layer: nn.Module) -> None:
    assert csr_twin(layer) is None


@pytest.fixture
def built() -> Iterator[Callable[[], list[nn.Module]]]:
    """What the runtime has called last, to look into."""
    seen: list[nn.Module] = []
    real = sparse_csr.torch_runner

    def spied(model: nn.Module, inputs: tuple[object, ...]) -> Callable[[], object]:
        seen.append(model)
        return real(model, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_csr, "torch_runner", spied)
        yield lambda: [*seen[-1].modules()]


class Net(nn.Module):
    """A convolution and a linear layer that pay at a density of .02, and a small one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide, self.small = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(1024, 1024), nn.Linear(1024, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().view(len(x), -1, 1024)
        out: Tensor = self.small(self.wide(x))
        return out


def test_layers_that_are_faster_are_replaced_and_the_model_is_untouched(
    built: Callable[[], list[nn.Module]],
) -> None:
    torch.manual_seed(0)
    model, x = thinned(Net(), 0.02), torch.randn(8, 64, 16, 16)
    state, parts = copy.deepcopy(model.state_dict()), [*model.modules()]
    SparseCsr()(model, (x,), 1)()
    made = built()
    assert any(isinstance(m, CsrLinear) and m.weight.shape == (1024, 1024) for m in made)
    with torch.inference_mode():
        torch.testing.assert_close(made[0](x), model(x), rtol=1e-4, atol=1e-4)
    assert [*model.modules()] == parts
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_of_one_layer_is_replaced_as_well(
    built: Callable[[], list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_csr, "WORTH", 1e9)
    SparseCsr().operation(thinned(nn.Linear(8, 8)), torch.randn(2, 8), 1)()
    assert isinstance(built()[0], CsrLinear)


@pytest.mark.parametrize("faster", [True, False])
def test_which_of_the_two_stays_is_what_was_measured(
    faster: bool, built: Callable[[], list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_csr, "WORTH", 1e9 if faster else 0.0)
    model, x = thinned(Net()), torch.randn(1, 64, 16, 16)
    SparseCsr()(model, (x,), 1)()
    made = [m for m in built() if isinstance(m, CsrLinear | CsrConv2d)]
    assert len(made) == (3 if faster else 0)
    assert (built()[0] is model) != faster
    with torch.inference_mode():
        torch.testing.assert_close(built()[0](x), model(x), rtol=1e-4, atol=1e-4)


def test_a_transformer_that_calls_by_keywords_answers_as_in_torch(
    built: Callable[[], list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_csr, "WORTH", 1e9)
    bert, example = thinned(MODELS["bert"].build()), MODELS["bert"].example()
    SparseCsr()(bert, (example,), 1)()
    assert any(isinstance(m, CsrLinear) for m in built())
    with torch.inference_mode():
        torch.testing.assert_close(built()[0](**example)[0], bert(**example)[0], rtol=1e-4, atol=1e-5)


def test_a_dense_model_and_layers_that_somebody_listens_to_run_as_they_are(
    built: Callable[[], list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_csr, "WORTH", 1e9)
    dense, heard = Net().eval(), thinned(nn.Sequential(nn.Linear(8, 8)))
    heard[0].register_forward_hook(lambda module, args, out: out + 1.0)  # type: ignore[index]
    for model, x in ((dense, torch.randn(1, 64, 16, 16)), (heard, torch.randn(2, 8))):
        SparseCsr()(model, (x,), 1)()
        assert built()[0] is model


def test_a_whole_model_that_is_slower_with_its_sparse_layers_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[int, Callable[[], object]] = {}
    real = sparse_csr.torch_runner

    def kept(model: nn.Module, inputs: tuple[object, ...]) -> Callable[[], object]:
        return made.setdefault(id(model), real(model, inputs))

    asked: list[bool] = []
    monkeypatch.setattr(sparse_csr, "torch_runner", kept)
    monkeypatch.setattr(sparse_csr, "_takes_less", lambda *runs: asked.append(True) or len(asked) <= 3)
    model = thinned(Net())
    assert SparseCsr()(model, (torch.randn(1, 64, 16, 16),), 1) is made[id(model)]
    assert (len(asked), len(made)) == (4, 2)


def test_a_layer_that_is_called_in_another_way_stays_dense(
    built: Callable[[], list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(input=self.conv(x[0]).mean((1, 2)))
            return out

    monkeypatch.setattr(sparse_csr, "WORTH", 1e9)
    SparseCsr()(thinned(Odd()), (torch.randn(1, 4, 5, 5),), 1)()
    assert not any(isinstance(m, CsrLinear | CsrConv2d) for m in built())


def test_where_torch_multiplies_no_sparse_matrices_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(weight: Tensor) -> Tensor:
        raise RuntimeError("Calling addmm on a sparse CPU tensor requires MKL\nand more")

    assert _csr.why_not() == ""
    monkeypatch.setattr(_csr, "csr", fails)
    runtime = resolve("sparse_csr", CPU)
    said = r"sparse_csr cannot run this model \(.*this torch multiplies no sparse matrices: Calling addmm on a sparse"
    with pytest.raises(InputError, match=said) as caught:
        runtime.load(thinned(nn.Sequential(nn.Linear(8, 8))), (torch.randn(2, 8),))
    assert "\n" not in str(caught.value)
    runtime.load(nn.Sequential(nn.Linear(8, 8)).eval(), (torch.randn(2, 8),))


class Asking(nn.Module):
    """Looks at its layer beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y[:, : self.fc.out_features // 2]


def test_a_forward_that_asks_more_of_a_layer_than_to_be_called_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_csr, "_takes_less", lambda *_: True)
    SparseCsr()(thinned(Asking()), (torch.randn(4, 256),), 1)()
