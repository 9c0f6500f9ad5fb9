"""An optimizer's state follows the removal, and the applied model trains on: alone, compiled, on two processes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import autoprune
from autoprune.errors import InputError
from autoprune.files.policy_file import load_front
from autoprune.front import Point
from autoprune.structure import Structure
from autoprune.tracing.slim import kept_positions, named_tensors
from tests.golden_models import RandomPictures, mixed

pytestmark = pytest.mark.filterwarnings("ignore:without a task autoprune.apply only slices")
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "goldens" / "0.1.0" / "mixed.json"
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, 2e-3, betas=(0.8, 0.99), amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True),
}


@pytest.fixture(scope="module")
def point() -> Point:
    return load_front(GOLDEN)[0]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 1, 8, 8, generator=draws), torch.randint(0, 5, (8,), generator=draws)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_the_removal_and_training_goes_on(name: str, point: Point) -> None:
    dense = mixed()
    small = autoprune.apply(point, dense, RandomPictures("mixed").example_inputs())
    weights, rest = [p for p in dense.parameters() if p.dim() > 1], [p for p in dense.parameters() if p.dim() == 1]
    optimizer = OPTIMIZERS[name]([{"params": weights}, {"params": rest, "weight_decay": 0.0, "lr": 0.01}])
    for seed in range(3):
        step(dense, optimizer, seed)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    made = autoprune.transfer_optimizer(optimizer, dense, small)
    assert type(made) is type(optimizer)
    told = [{k: v for k, v in group.items() if k != "params"} for group in made.param_groups]
    assert told == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(dense).items()}
    kept = kept_positions(Structure(point.base.groups, ()), point.keep, shapes)
    for tensor, parameter in small.named_parameters():
        mine, theirs = made.state[parameter], optimizer.state[dict(dense.named_parameters())[tensor]]
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                assert mine[key] == value
                continue
            for dim in range(value.dim()):
                value = value.index_select(dim, kept[tensor, dim]) if (tensor, dim) in kept else value
            assert torch.equal(mine[key], value)
    start = {n: p.clone() for n, p in small.named_parameters()}
    step(small, made, 7)
    assert all(bool(p.isfinite().all()) for p in small.parameters())
    assert any(not torch.equal(p, start[n]) for n, p in small.named_parameters())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(torch.as_tensor(v), after[i][k]) for i, held in before.items() for k, v in held.items())


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_the_one_inside_and_a_factored_state_begins_anew(point: Point) -> None:
    dense = mixed()
    small = autoprune.apply(point, dense, RandomPictures("mixed").example_inputs())
    optimizer = torch.optim.Adafactor(dense.parameters(), lr=1e-3)
    step(dense, optimizer, 0)
    made = autoprune.transfer_optimizer(optimizer, torch.compile(dense), torch.compile(small))
    vectors = [p for p in small.parameters() if p.dim() == 1]
    assert all(p in made.state for p in vectors)
    step(small, made, 1)
    assert all(bool(p.isfinite().all()) for p in small.parameters())


def test_models_and_optimizers_that_do_not_belong_together_are_one_line(point: Point) -> None:
    dense = mixed()
    small = autoprune.apply(point, dense, RandomPictures("mixed").example_inputs())
    with pytest.raises(InputError, match="does not come from autoprune"):
        autoprune.transfer_optimizer(torch.optim.SGD(dense.parameters(), 0.1), dense, mixed())
    other = nn.Linear(2, 2)
    with pytest.raises(InputError, match="give the model that was pruned"):
        autoprune.transfer_optimizer(torch.optim.SGD(other.parameters(), 0.1), other, small)
    with pytest.raises(InputError, match=r"parameter \[2, 2\] is none of the dense model"):
        autoprune.transfer_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], 0.1), dense, small)


TWO = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import autoprune
from tests.golden_models import mixed
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[3]), world_size=2)
model = DistributedDataParallel(autoprune.load(sys.argv[1], factory=mixed))
optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
for seed in range(3):
    draws = torch.Generator().manual_seed(2 * seed + dist.get_rank())
    x, y = torch.randn(8, 1, 8, 8, generator=draws), torch.randint(0, 5, (8,), generator=draws)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
torch.save(model.module.state_dict(), f"{sys.argv[2]}.{dist.get_rank()}")
dist.destroy_process_group()
"""


def test_an_applied_model_trains_on_two_processes(point: Point, tmp_path: Path) -> None:
    small = autoprune.apply(point, mixed(), RandomPictures("mixed").example_inputs())
    autoprune.save(small, tmp_path / "small")
    meeting = tmp_path / "meeting"
    command = [sys.executable, "-c", TWO, str(tmp_path / "small"), str(meeting)]
    both = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    first, second = (torch.load(f"{meeting}.{rank}", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert any(not torch.equal(value, first[key]) for key, value in small.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_an_applied_model_compiles(point: Point) -> None:
    small = autoprune.apply(point, mixed(), RandomPictures("mixed").example_inputs())
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, backend="aot_eager", fullgraph=True)(x), small(x))
