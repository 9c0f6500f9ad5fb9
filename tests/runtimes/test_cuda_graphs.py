"""CUDA graphs: one line where there is no GPU, the model's own outputs where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.latency.runtime_here import resolve
from autoprune.runtimes.cuda_graphs import CudaGraphs

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^latency\.runtime: cuda_graphs runs on a CUDA GPU, and there is none here"):
        resolve("cuda_graphs", CPU)


@pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU here")
def test_a_replay_gives_what_the_model_gives() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval().cuda()
    x = torch.randn(2, 3, 8, 8, device="cuda")
    with torch.no_grad():
        wanted = model(x)
    found = CudaGraphs()(model, (x,), 1)()
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, wanted)
