"""What analyze finds in each family, and that the lent model does not notice."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.structure import Structure
from autoprune.tasks._cifar_resnet import resnet20
from autoprune.tracing.analyze import analyze, analyzed
from autoprune.tracing.ops import count_macs
from tests.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_expected_groups_alive(name: str) -> None:
    family = FAMILIES[name]
    structure = analyze(family.build(), family.inputs())
    assert {g.name: g.width for g in structure.groups} == family.alive
    assert all(g.grid == tuple(range(g.kind != "block", g.width + 1)) for g in structure.groups)
    assert not set(structure.frozen) & set(structure.names)


def test_the_cifar_resnet_has_its_nine_inner_groups_and_the_stream_that_padding_shifts() -> None:
    structure = analyze(resnet20(), (torch.zeros(2, 3, 32, 32).normal_(generator=torch.Generator().manual_seed(0)),))
    widths = {f"layer{stage}.{block}.conv1": 8 * 2**stage for stage in (1, 2, 3) for block in range(3)}
    blocks = ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]
    assert {g.name: g.width for g in structure.groups if g.kind == "channel"} == {"conv1": 16, **widths}
    assert [g.name for g in structure.groups if g.kind == "block"] == blocks, "the others change the size of the map"
    stream = structure.group("conv1")
    stages = {"conv1": 0, "layer1": 0, "layer2": 8, "layer3": 24}
    assert all(s.offset == stages[s.tensor.split(".")[0]] for s in stream.slices if s.role == "produce")
    reads = {s.tensor: s.offset for s in stream.slices if s.role == "consume"}
    assert (reads["layer2.0.conv1.weight"], reads["layer3.0.conv1.weight"], reads["linear.weight"]) == (0, 8, 24)
    assert dict(structure.frozen) == {"linear": "its channels are the model's output"}


def test_groups_come_in_execution_order_and_not_in_the_order_of_registration() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.second, self.first = nn.Linear(6, 2), nn.Linear(5, 6), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.second(self.first(x).relu()).relu())
            return y

    structure = analyze(Backwards(), (torch.randn(2, 4),))
    assert structure.names == ("first", "second")
    assert [op.name for op in structure.ops] == ["first", "second", "last"]


def test_flatten_gives_every_channel_its_run_of_features() -> None:
    structure = _structure("plain")
    (read,) = [s for s in structure.group("conv2").slices if s.role == "consume"]
    assert structure.group("conv2").slices[-1] == read
    assert (read.tensor, read.dim, read.stride, read.repeat) == ("fc1.weight", 1, 16, 16)


def test_concat_gives_each_producer_its_offset() -> None:
    reads = {g.name: [s for s in g.slices if s.tensor == "conv2.weight" and s.dim == 1] for g in _structure("densenet")}
    assert [s.offset for s in reads["stem"]] == [0]
    assert [s.offset for s in reads["conv1"]] == [8]


def test_a_transposed_conv_is_read_in_dimension_0_and_written_in_dimension_1() -> None:
    structure = _structure("unet")
    assert any(
        s.tensor == "up2.weight" and s.dim == 0 and s.role == "consume" for s in structure.group("middle.0").slices
    )
    assert any(s.tensor == "up2.weight" and s.dim == 1 and s.role == "produce" for s in structure.group("up2").slices)


def test_an_atom_of_a_grouped_conv_is_one_channel_of_every_conv_group() -> None:
    group = _structure("resnext").group("conv2.0")
    rows = sorted(p for s in group.slices if s.tensor == "conv2.0.weight" and s.dim == 0 for p in s.positions(1))
    assert rows == [1, 7, 13, 19]


def test_depthwise_convs_and_norms_are_carried() -> None:
    group = _structure("mobilenet").group("block1.expand.0")
    roles = {s.tensor: s.role for s in group.slices}
    assert roles["block1.depthwise.0.weight"] == roles["block1.depthwise.1.running_var"] == "carry"
    assert roles["block1.se.expand.weight"] == "produce"


def test_frozen_parameters_are_still_prunable() -> None:
    family = FAMILIES["projection"]
    model = family.build().requires_grad_(False)
    assert set(analyze(model, family.inputs()).names) == set(family.alive)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_same_model_gives_the_same_structure_whatever_the_seed_and_batch() -> None:
    family = FAMILIES["mobilenet"]
    first = analyze(family.build(), family.inputs())
    other = analyze(family.build().train(), family.inputs(5), seed=3)
    assert first == other
    assert first.fingerprint == other.fingerprint


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lent_model_comes_back_untouched(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().train().to(memory_format=torch.channels_last)
    first = next(model.parameters())
    first.requires_grad_(False)
    for parameter in list(model.parameters())[1:]:
        parameter.grad = torch.ones_like(parameter)
    list(model.modules())[-1].eval()
    before, random_state = _fingerprint(model), torch.get_rng_state()
    inputs = family.inputs()
    given = inputs[0].clone()
    analyze(model, inputs)
    assert _fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(inputs[0], given)
    assert not inputs[0].requires_grad


def test_a_model_of_which_nothing_can_be_pruned_has_a_structure_without_groups() -> None:
    structure = analyze(nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 4),))
    assert len(structure) == 0
    assert structure.frozen == {"0": "its channels are the model's output"}
    assert sum(op.positions for op in structure.ops) * 12 == 12


def test_parameters_without_a_module_shrink_with_their_channels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)
            self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.conv(x) * self.gamma)
            return y

    group = analyze(Scaled(), (torch.randn(2, 3, 8, 8),)).group("conv")
    assert any((s.tensor, s.dim, s.role) == ("gamma", 0, "carry") for s in group.slices)


def test_the_model_input_may_be_part_of_a_concat() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.cat([x, self.conv(x).relu()], 1))
            return y

    (read,) = [s for s in analyze(Skip(), (torch.randn(2, 3, 8, 8),)).group("conv").slices if s.role == "consume"]
    assert read.offset == 3


def test_several_inputs_and_a_dict_of_outputs_are_fine() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"logits": self.head((self.a(x) + self.b(y)).relu()), "extra": [x]}

    structure = analyze(Two(), (torch.randn(2, 4), torch.randn(2, 3)))
    assert {s.tensor for s in structure.group("a").slices if s.role == "produce"} == {
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
    }


def test_macs_without_a_weight_are_a_constant_operation() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.bmm(x, x.transpose(1, 2)).bmm(x)
            y: Tensor = self.head(self.proj(x).relu())
            return y

    model, inputs = Attends(), (torch.randn(2, 5, 4),)
    structure = analyze(model, inputs)
    (constant,) = [op for op in structure.ops if op.weight is None]
    assert constant.positions == 2 * 5 * 5 * 4
    assert count_macs(model, inputs) == 2 * 5 * 5 * 4 + 5 * (4 * 6 + 6 * 2)
    assert structure.names == ("proj",)


def test_a_tied_weight_is_counted_once_and_its_uses_add_up() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.b(self.a(x).relu()).relu())
            return y

    structure = analyze(Tied(), (torch.randn(2, 4),))
    assert [s.name for op in structure.ops for s in op.tensors].count("a.weight") == 1
    assert next(op for op in structure.ops if op.name == "a").positions == 2


def test_a_model_that_insists_on_its_own_precision_is_certified_in_it() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(torch.eye(4, dtype=torch.float32).matmul(x.T).T).relu())
            return y

    assert analyze(Single(), (torch.randn(2, 4),)).names == ("a",)


def test_an_embedding_makes_channels_also_where_the_output_layer_is_tied_to_it() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.back = nn.Embedding(20, 8), nn.Conv1d(8, 6, 3, padding=1), nn.Conv1d(6, 8, 1)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids).transpose(1, 2)
            y: Tensor = self.head((x + self.back(self.conv(x).relu())).transpose(1, 2))
            return y

    structure = analyze(Words(), (torch.arange(10).view(2, 5),))
    assert {g.name: g.width for g in structure.groups} == {"embed": 8, "conv": 6}
    tied = {(s.dim, s.role) for s in structure.group("embed").slices if s.tensor == "embed.weight"}
    assert tied == {(1, "consume")}  # one dimension shrinks once, whoever uses it


class _Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.lock = threading.Lock()


class _Inputless(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (_Locked(), (torch.randn(2, 3),), "cannot be copied"),
        (nn.Linear(3, 2), (torch.randn(2, 4),), "does not run on its example inputs"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)), (torch.randn(2, 3),), "'1'"),
        (_Inputless(), (3,), "example_inputs must hold a tensor"),
    ],
)
def test_a_model_that_cannot_be_analysed_is_one_clear_line(model: nn.Module, inputs: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        analyze(model, inputs)
    assert "\n" not in str(caught.value)


def _structure(name: str) -> Structure:
    family = FAMILIES[name]
    return analyze(family.build(), family.inputs())


def _fingerprint(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    modules = [(id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    states = [
        (
            id(t),
            t.data_ptr(),
            t._version,
            t.stride(),
            t.requires_grad,
            None if t.grad is None else id(t.grad),
            t.sum().item(),
        )
        for t in tensors
    ]
    return [*modules, *states]


def test_what_the_analysis_took_is_one_line_where_it_took_long() -> None:
    family = FAMILIES["plain"]
    found = analyzed(family.build(), family.inputs())
    assert found.structure == analyze(family.build(), family.inputs())
    assert replace(found, seconds=0.1).said == ""
    shape = " x ".join(str(n) for n in (2, *family.shape))
    long = replace(found, seconds=12.34).said
    assert (
        long
        == f"analysis: {len(family.alive)} groups proved in 17 passes on inputs of {shape}, 12.3 s of processor time"
    )
