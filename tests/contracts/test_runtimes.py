"""The contract of every file in autoprune/runtimes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.latency.runtime_here import RuntimeHere, resolve

CPU = torch.device("cpu")


@pytest.fixture(params=plugins.names("runtimes"))
def runtime(request: pytest.FixtureRequest) -> RuntimeHere:
    try:
        return resolve(request.param, CPU)
    except InputError as error:
        pytest.skip(str(error))


class Refusing(nn.Module):
    """A model that does not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this model does not run")


def test_a_model_and_a_narrower_one_run_and_come_back_as_they_were(runtime: RuntimeHere) -> None:
    model, small = (nn.Sequential(nn.Linear(4, n), nn.Linear(n, 3)).eval() for n in (8, 5))
    state = copy.deepcopy(model.state_dict())
    runs = [runtime.load(m, (torch.ones(1, 4),)) for m in (model, small)]
    for run in (*runs, runs[0]):
        run()
    assert not model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_single_operation_runs(runtime: RuntimeHere) -> None:
    runtime.load_operation(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8))()
    runtime.load_operation(nn.Linear(3, 4).eval(), torch.randn(2, 3))()


def test_a_model_that_it_cannot_run_is_one_line(runtime: RuntimeHere) -> None:
    with pytest.raises(InputError, match=rf"latency\.runtime: {runtime.name} cannot run this model") as caught:
        runtime.load(Refusing(), (torch.ones(1, 2),))
    assert "\n" not in str(caught.value)


def test_its_version_is_part_of_what_its_figures_depend_on(runtime: RuntimeHere) -> None:
    assert f"torch {torch.__version__.partition('+')[0]}" in runtime.version  # not the build's own suffix
    assert "source" in runtime.version
