"""What modules inside give is noted, compared over real tokens, and refused where it was narrowed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.evaluator.features import Features, feature_loss, noted


class Residual(nn.Module):
    """A stream of 6 with a branch that may be narrowed."""

    def __init__(self, inner: int = 8) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, inner), nn.Linear(inner, 6)
        self.head, self.pair = nn.Linear(6, 3), Pair()

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        first, _ = self.pair(stream + self.down(self.up(stream).relu()))
        out: Tensor = self.head(first)
        return out


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x, 3


INPUTS = (torch.ones(2, 4),)


def test_globs_name_the_modules_and_a_tuple_gives_its_tensor() -> None:
    dense = Residual()
    assert Features.of(["s*", "down", "stem"], dense, INPUTS).names == ("stem", "down")
    with noted(dense, ("pair", "stem")) as seen:
        dense(torch.ones(3, 4))
        pair, stem = seen()
        dense(torch.ones(5, 4))
    assert (pair.shape, stem.shape, seen()[0].shape) == ((3, 6), (3, 6), (5, 6))
    assert not seen()
    assert not dense.stem._forward_hooks


def test_what_was_narrowed_or_is_not_there_is_one_line_with_what_can_be_taken() -> None:
    dense, small = Residual(), Residual(5)
    Features.of(["stem", "down", "pair"], dense, INPUTS).check(small)
    said = r"'up' gives \[2, 5\] in the pruned model and \[2, 8\] in the dense one.* stays in stem, down, head, pair"
    with pytest.raises(InputError, match=said):
        Features.of(["up"], dense, INPUTS).check(small)
    with pytest.raises(InputError, match=r"'stm' matches no module of the model; did you mean 'stem'"):
        Features.of(["stm"], dense, INPUTS)
    with pytest.raises(InputError, match=r"'layer\*' matches no module of the model; stem, up, down"):
        Features.of(["layer*"], dense, INPUTS)
    silent = nn.Sequential(nn.ModuleDict({"never": nn.Linear(4, 4)}), nn.Linear(4, 2))
    silent.forward = silent[1].forward  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"module '0\.never' gives no floating tensor"):
        Features.of(["0.never"], silent, INPUTS)


def test_the_loss_is_the_mean_squared_error_as_a_share_of_the_dense_output() -> None:
    torch.manual_seed(0)
    f, d = [torch.randn(3, 6), 100 * torch.randn(3, 6)], [torch.randn(3, 6), 100 * torch.randn(3, 6)]
    wanted = sum(nn.functional.mse_loss(a, b) / b.square().mean() for a, b in zip(f, d, strict=True)) / 2
    torch.testing.assert_close(feature_loss(f, d, None), torch.as_tensor(wanted))
    assert float(feature_loss(d, d, None)) == 0.0
    with pytest.raises(RuntimeError, match="called 1 times, in the dense model 2"):
        feature_loss(f[:1], d, None)


def test_a_padded_token_teaches_nothing() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    mine, theirs = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    wild = copy.deepcopy(mine)
    wild[0, 2:] = 1e6
    batch = {"attention_mask": mask}
    assert float(feature_loss([wild], [theirs], batch)) == float(feature_loss([mine], [theirs], batch))
    assert float(feature_loss([wild], [theirs], {"attention_mask": torch.ones(2, 4)})) > 1e6
