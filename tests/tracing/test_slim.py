"""slim == masked and polynomial == counted, over random widths of every family; what slim does to a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.allocation.polynomial import macs_polynomial, numel_polynomial
from autoprune.errors import InputError, RunError
from autoprune.policy import Policy
from autoprune.structure import Structure
from autoprune.tracing.analyze import analyze
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.ops import count_macs
from autoprune.tracing.slim import kept_positions, named_tensors, set_attributes, slim
from autoprune.tracing.verify import audit, masked, relative_error, verify
from tests.families import FAMILIES

few = settings(max_examples=10, deadline=None, derandomize=True, database=None)


@cache
def structure_of(name: str) -> Structure:
    return analyze(FAMILIES[name].build(), FAMILIES[name].inputs())


def keeps(structure: Structure) -> st.SearchStrategy[dict[str, list[int]]]:
    """A random width and random atoms for every group."""
    return st.fixed_dictionaries(
        {g.name: st.sets(st.integers(0, g.width - 1), min_size=1, max_size=g.width).map(sorted) for g in structure}
    )


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@few
def test_the_slim_model_equals_the_masked_one_and_costs_what_the_polynomial_says(
    name: str, data: st.DataObject
) -> None:
    structure, family = structure_of(name), FAMILIES[name]
    keep = data.draw(keeps(structure))
    dense, small = family.build().eval(), family.build().eval()
    slim(small, structure, keep)
    assert verify(small, dense, structure, keep, family.inputs()) <= 1e-5
    with torch.no_grad():  # and against zeros written by hand, in the precision of the model
        for g in structure:
            gone = set(range(g.width)) - set(keep[g.name])
            for s in g.slices:
                if s.role == "consume":
                    where = torch.tensor([p for a in sorted(gone) for p in s.positions(a)], dtype=torch.int64)
                    named_tensors(dense)[s.tensor].index_fill_(s.dim, where, 0)
        assert relative_error(small(*family.inputs()), dense(*family.inputs())) <= 1e-5
    policy = Policy.of({group: len(kept) for group, kept in keep.items()})
    widths = policy.array(structure)
    assert int(macs_polynomial(structure)(widths)) == count_macs(small, family.inputs())
    parameters = numel_polynomial(structure, lambda spec: int(spec.is_parameter))
    assert int(parameters(widths)) == sum(p.numel() for p in small.parameters())
    size = numel_polynomial(structure, lambda spec: spec.itemsize)
    assert int(size(widths)) == sum(t.numel() * t.element_size() for t in named_tensors(small).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_one_atom_left_in_every_group_still_runs_and_is_equal(name: str) -> None:
    structure, family = structure_of(name), FAMILIES[name]
    keep = {g.name: [g.width - 1] for g in structure}
    small = family.build()
    slim(small, structure, keep)
    assert verify(small, family.build(), structure, keep, family.inputs()) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_changes_nothing(name: str) -> None:
    structure, model = structure_of(name), FAMILIES[name].build()
    before = weights_fingerprint(model)
    slim(model, structure, {g.name: range(g.width) for g in structure})
    assert weights_fingerprint(model) == before


def test_parameters_keep_their_identity_mode_flags_and_memory_format_and_lose_their_gradients() -> None:
    structure, model = (
        structure_of("resnext"),
        FAMILIES["resnext"].build().to(memory_format=torch.channels_last).train(),
    )
    parameters, buffers = list(model.parameters()), list(model.buffers())
    parameters[0].requires_grad_(False)
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    slim(model, structure, {"conv1.0": [0, 2], "conv2.0": [1, 3, 5]})
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert not parameters[0].requires_grad
    weight = model.get_parameter("conv2.0.weight")
    assert weight.shape == (12, 2, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad is None
    assert model.training


def test_attributes_agree_with_the_tensors() -> None:
    structure, model = structure_of("mobilenet"), FAMILIES["mobilenet"].build()
    slim(model, structure, {"block1.expand.0": [1, 5, 9], "stem.0": [0, 7]})
    depthwise = model.get_submodule("block1.depthwise.0")
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (3, 3, 3)
    norm = model.get_submodule("stem.1")
    assert norm.num_features == 2
    audit(model)
    norm.num_features = 8
    with pytest.raises(RunError, match=r"stem\.1\.num_features is 8, its tensors say 2"):
        audit(model)


def test_a_grouped_conv_with_one_channel_a_conv_group_is_not_taken_for_a_depthwise_one() -> None:
    structure, model = structure_of("resnext"), FAMILIES["resnext"].build()
    conv = model.get_submodule("conv2.0")
    slim(model, structure, {"conv1.0": [3], "conv2.0": [2]})
    assert (conv.groups, conv.in_channels, conv.out_channels) == (4, 4, 4)
    conv.weight.data = torch.zeros(12, 1, 3, 3)  # wider again, as a resident model that is stitched anew
    set_attributes(model, structure)
    assert (conv.groups, conv.in_channels, conv.out_channels) == (4, 4, 12)


def test_the_slim_model_is_plain_it_copies_saves_and_trains() -> None:
    structure, family = structure_of("unet"), FAMILIES["unet"]
    model = family.build()
    slim(model, structure, {g.name: range(g.width // 2) for g in structure})
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    before = weights_fingerprint(twin)
    twin(*family.inputs()).square().mean().backward()
    optimiser.step()
    assert weights_fingerprint(twin) != before


def test_a_second_removal_is_refused() -> None:
    structure, model = structure_of("plain"), FAMILIES["plain"].build()
    slim(model, structure, {"conv1": [0, 1]})
    with pytest.raises(InputError, match="already pruned"):
        slim(model, structure, {"conv1": [0, 1]})


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"conv9": [0]}, "did you mean 'conv"),
        ({"conv1": [3, 1]}, "must ascend within 0..7"),
        ({"conv1": [1, 8]}, "must ascend within 0..7"),
        ({"conv1": [1, 1]}, "must ascend within 0..7"),
    ],
)
def test_a_keep_that_does_not_fit_is_refused(keep: dict[str, list[int]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        slim(FAMILIES["plain"].build(), structure_of("plain"), keep)


def test_kept_positions_name_only_what_gets_narrower() -> None:
    structure = structure_of("plain")
    shapes = {spec.name: spec.shape for op in structure.ops for spec in op.tensors}
    kept = kept_positions(structure, {"conv2": [0, 2]}, shapes)
    assert set(kept) == {("conv2.weight", 0), ("conv2.bias", 0), ("act2.weight", 0), ("fc1.weight", 1)}
    assert kept["fc1.weight", 1].tolist() == [*range(16), *range(32, 48)]


def test_a_slim_model_that_computes_something_else_is_caught() -> None:
    structure, family = structure_of("densenet"), FAMILIES["densenet"]
    keep = {"conv1": [0, 1, 2]}
    small = family.build()
    slim(small, structure, keep)
    small.get_submodule("bn2").eps = 0.5
    with pytest.raises(RunError, match=r"differs from its masked reference by .* \(allowed: 1e-05\)"):
        verify(small, family.build(), structure, keep, family.inputs())


def test_a_slim_model_of_other_widths_is_caught() -> None:
    structure, family = structure_of("densenet"), FAMILIES["densenet"]
    small = family.build()
    slim(small, structure, {"conv1": [0, 1, 2]})
    with pytest.raises(RunError, match="in the pruned model, by its policy it is"):
        verify(small, family.build(), structure, {"conv1": [0, 1]}, family.inputs())


def test_repaired_weights_and_added_biases_are_part_of_the_masked_reference() -> None:
    structure, family = structure_of("projection"), FAMILIES["projection"]
    keep = {"conv1": [0, 3], "b1.0": [1, 2, 9]}
    small = family.build()
    slim(small, structure, keep)
    first = small.get_submodule("b1.0")
    first.bias = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        small.get_parameter("b2.0.weight").mul_(1.5)
    dense = family.build()
    assert verify(small, dense, structure, keep, family.inputs()) <= 1e-5
    bias = masked(dense, small, structure, keep).get_parameter("b1.0.bias")
    assert torch.equal(bias[[1, 2, 9]], first.bias)
    assert int(bias.count_nonzero()) == 3
    assert dense.get_submodule("b1.0").bias is None


def test_the_fingerprint_follows_the_values_alone() -> None:
    model = FAMILIES["resnext"].build()
    before = weights_fingerprint(model)
    assert weights_fingerprint(model.to(memory_format=torch.channels_last)) == before
    assert weights_fingerprint(copy.deepcopy(model).requires_grad_(False)) == before
    weight = next(model.parameters())
    with torch.no_grad():
        weight[0, 0, 0, 0] = float(np.nextafter(np.float32(weight[0, 0, 0, 0].item()), np.float32(9)))
    assert weights_fingerprint(model) != before
    assert before.startswith("sha256:")


def test_macs_are_counted_on_the_cpu_where_meta_cannot_run_the_model() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) * x.sum().item()
            return y

    assert count_macs(Asks(), (torch.randn(2, 4),)) == 12


@pytest.mark.parametrize("kept", [range(4), range(0, 8, 2), range(3, 8), (0, 1, 5), (7,), range(8)])
def test_what_was_removed_is_not_kept_in_memory(kept: Sequence[int]) -> None:
    family = FAMILIES["plain"]
    model = family.build().to(memory_format=torch.channels_last)
    dense = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    structure = analyze(model, family.inputs())
    slim(model, structure, {"conv1": tuple(kept)})
    for name, tensor in named_tensors(model).items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        rows = dense[name][list(kept)] if name.startswith(("conv1", "bn1")) and tensor.dim() else dense[name]
        assert torch.equal(tensor, rows[:, list(kept)] if name == "conv2.weight" else rows)
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_was_narrowed_to_one_channel_or_norm_group_widens_again() -> None:
    """A model that lives on from one policy to the next is told what its tensors are each time."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 5, 1)
    model = nn.Sequential(*layers).eval()
    inputs = (torch.randn(2, 3, 6, 6),)
    structure = analyze(model, inputs)
    dense = {name: tensor.data for name, tensor in named_tensors(model).items()}
    for kept in ((3,), (0, 2, 5), tuple(range(8))):
        for name, tensor in named_tensors(model).items():
            tensor.data = dense[name]
        for (name, dim), where in kept_positions(
            structure, {"0": kept}, {n: t.shape for n, t in dense.items()}
        ).items():
            named_tensors(model)[name].data = named_tensors(model)[name].data.index_select(dim, where)
        set_attributes(model, structure)
        assert (model[1].in_channels, model[1].out_channels, model[1].groups) == (len(kept), 2 * len(kept), len(kept))
        assert (model[2].num_channels, model[2].num_groups) == (2 * len(kept), len(kept))
        model(*inputs)
