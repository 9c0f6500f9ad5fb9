"""The contract of every file in autoprune/runtimes."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.files.machine import usable_cores
from autoprune.latency.runtime_here import RuntimeHere, resolve
from autoprune.tracing.one_thread import on_threads

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
    model, small = (nn.Sequential(nn.Linear(4, n), nn.Linear(n, 3)).eval().to(runtime.device) for n in (8, 5))
    state = copy.deepcopy(model.state_dict())
    runs = [runtime.load(m, (torch.ones(1, 4, device=runtime.device),)) for m in (model, small)]
    for run in (*runs, runs[0]):
        run()
    assert not model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_single_operation_runs(runtime: RuntimeHere) -> None:
    at = runtime.device
    runtime.load_operation(nn.Conv2d(3, 4, 3).eval().to(at), torch.randn(1, 3, 8, 8, device=at))()
    runtime.load_operation(nn.Linear(3, 4).eval().to(at), torch.randn(2, 3, device=at))()


def test_a_model_that_it_cannot_run_is_one_line(runtime: RuntimeHere) -> None:
    with pytest.raises(InputError, match=rf"latency\.runtime: {runtime.name} cannot run this model") as caught:
        runtime.load(Refusing(), (torch.ones(1, 2),))
    assert "\n" not in str(caught.value)


def test_its_version_is_part_of_what_its_figures_depend_on(runtime: RuntimeHere) -> None:
    assert f"torch {torch.__version__.partition('+')[0]}" in runtime.version  # not the build's own suffix
    assert "source" in runtime.version


def test_its_step_is_a_number_of_channels(runtime: RuntimeHere) -> None:
    assert runtime.step >= 1


@pytest.mark.skipif(usable_cores() < 2, reason="one core")
def test_it_takes_more_threads_than_one(runtime: RuntimeHere) -> None:
    two = resolve(runtime.name, runtime.device, 2)
    assert two.threads == 2
    assert two.clock is time.perf_counter, "what threads compute together is no latency"
    with on_threads(2):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).eval().to(two.device)
        two.load(model, (torch.ones(1, 4, device=two.device),))()
