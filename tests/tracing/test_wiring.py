"""Sites: which norm reads a weight's output, and which weights close a residual branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.tasks._cifar_resnet import resnet20
from autoprune.tracing.wiring import find_sites
from tests.families import FAMILIES


def test_every_second_conv_of_a_residual_block_closes_its_branch_behind_its_norm() -> None:
    sites = find_sites(resnet20().eval(), (torch.randn(2, 3, 32, 32),))
    closing = {name for name, site in sites.items() if site.closes}
    assert closing == {f"layer{i}.{j}.conv2.weight" for i in (1, 2, 3) for j in range(3)}
    assert sites["layer1.0.conv2.weight"].norm == "layer1.0.bn2"
    assert sites["linear.weight"].norm is None
    assert sites["linear.weight"].bias == "linear.bias"


def test_of_two_branches_that_meet_the_larger_weight_closes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.thin = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.thin(x)
            y += self.wide(x)
            return y.relu()

    sites = find_sites(Two().eval(), (torch.randn(2, 3, 5, 5),))
    assert (sites["wide.weight"].closes, sites["thin.weight"].closes) == (True, False)


def test_an_output_that_is_used_again_closes_nothing() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (y + x) * y

    assert not find_sites(Again().eval(), (torch.randn(2, 3, 5, 5),))["conv.weight"].closes


def test_a_conv_that_is_called_twice_says_so() -> None:
    family = FAMILIES["shared"]
    sites = find_sites(family.build().eval(), family.inputs())
    assert any(site.calls > 1 and not site.closes and site.norm is None for site in sites.values())


def test_a_reshape_that_is_called_by_keyword_closes_nothing_and_fails_nothing() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4 * 25, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.flatten(input=self.conv(x).relu(), start_dim=1))

    sites = find_sites(ByName().eval(), (torch.randn(2, 3, 5, 5),))
    assert not any(site.closes for site in sites.values())
