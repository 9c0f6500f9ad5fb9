"""Every criterion against values worked out by hand, with the numbers in tests/criteria/by_hand.py."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.criteria import build_criterion
from autoprune.errors import InputError
from autoprune.structure import Group, Slice
from tests.criteria.by_hand import APART, ATOMS, GROUP, TOGETHER, atoms, linear, task_of, weights


def close(*values: float) -> object:
    return pytest.approx(list(values), rel=1e-6)


def test_magnitudes() -> None:
    assert weights("l1_norm") == [[2.0, 1.0]]
    assert weights("l2_norm") == [[4.0, 1.0]]
    assert atoms("l1_norm") == close(1.0, 1.0)  # both rows hold 3 in all
    assert atoms("l2_norm") == close(2 * sqrt(5) / (sqrt(5) + 3), 6 / (sqrt(5) + 3))


def test_random_scores_of_weights_follow_from_seed_and_name() -> None:
    assert weights("random") == weights("random")
    assert weights("random") != weights("random", seed=1)
    assert all(0 <= value < 1 for value in weights("random")[0])


def test_taylor_takes_the_product_with_the_gradient_batch_by_batch() -> None:
    # |w g| is (2, 2) and (6, 0), their mean (4, 1); of the mean gradient (1, -1) it is (2, 1)
    assert weights("taylor") == [close(4.0, 1.0)]
    assert weights("taylor", TOGETHER) == [close(2.0, 1.0)]
    assert atoms("taylor") == close(0.0, 36.0)  # (-2 + 2)^2 and (0 + 6)^2


def test_snip_takes_the_gradient_of_all_samples() -> None:
    assert weights("snip") == weights("snip", TOGETHER) == [close(2.0, 1.0)]  # w = (2, -1), mean gradient (1, -1)
    assert atoms("snip") == close(4.0, 6.0)  # |-2| + |2| and |0| + |6|


def test_fisher_squares_the_gradients_of_single_samples() -> None:
    # squared gradients (1, 4) and (9, 0), means (5, 2); w^2 = (4, 1)
    assert weights("fisher") == weights("fisher", TOGETHER) == [close(20.0, 2.0)]
    assert weights("fisher", TOGETHER, batch_size=2) == [close(4.0, 1.0)]  # of the mean gradient (1, -1)
    assert atoms("fisher") == close(8.0, 36.0)  # 4 + 4 and 0 + 36


def test_grasp_multiplies_the_weight_with_hessian_times_gradient() -> None:
    # H = mean of x x' = ((5, 1), (1, 2)), g = (1, -1), H g = (4, -1), times w = (2, -1)
    assert weights("grasp") == weights("grasp", TOGETHER) == [close(8.0, 1.0)]
    # of each row H = ((1, 2), (2, 4)); H g = (-5, -10) and (5, 10); times w: (-10, 10) and (0, 30)
    assert atoms("grasp") == close(0.0, 30.0)


def test_grasp_is_the_first_order_fall_of_the_gradient_flow() -> None:
    # removing a share e of w_1 = 2: g'g of w = (2 - 2e, -1) falls by 2 e * 8 to first order
    def flow(w: Tensor) -> float:
        x, y = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64), torch.tensor([1.0, 5.0]).double()
        return float((((x @ w - y)[:, None] * x).mean(0) ** 2).sum())

    share, dense = 1e-6, torch.tensor([2.0, -1.0], dtype=torch.float64)
    fall = flow(dense) - flow(torch.tensor([2.0 * (1 - share), -1.0], dtype=torch.float64))
    assert fall / share == pytest.approx(2 * weights("grasp")[0][0], rel=1e-4)


def test_movement_adds_up_along_the_steps() -> None:
    # step 1: -(2 * -1, -1 * -2) = (2, -2); w becomes (2.1, -.8)
    # step 2: the output is 6.3, the gradient 1.3 * (3, 0), so -(2.1 * 3.9, 0) = (-8.19, 0)
    assert weights("movement", steps=1, learning_rate=0.1) == [close(2.0, -2.0)]
    assert weights("movement", steps=2, learning_rate=0.1) == [close(-6.19, -2.0)]
    assert atoms("movement", steps=1) == close(0.0, -6.0)


def test_movement_goes_over_the_batches_again_and_again() -> None:
    # after step 2 w = (1.71, -.8); sample (1, 2) then has the output .11, residual -.89, gradient (-.89, -1.78)
    third = (1.71 * 0.89, -0.8 * 1.78)
    assert weights("movement", steps=3, learning_rate=0.1) == [close(-6.19 + third[0], -2.0 + third[1])]


def test_wanda_is_magnitude_times_the_norm_of_what_is_read() -> None:
    assert weights("wanda") == weights("wanda", TOGETHER) == [close(2 * sqrt(10), 2.0)]  # x is (1, 3) and (2, 0)
    assert atoms("wanda") == close(4.0, 6.0)  # 2 * 1 + 1 * 2 and 0 + 3 * 2


def test_wanda_of_convolutions_sees_the_places_of_the_kernel() -> None:
    conv = nn.Conv1d(1, 1, 2, bias=False)
    conv.weight = nn.Parameter(torch.tensor([[[1.0, -2.0]]]))
    # over (1, 2, 3) the first place of the kernel reads 1, 2 and the second 2, 3
    assert weights("wanda", task_of(conv, ([[[1.0, 2.0, 3.0]]], [[[0.0, 0.0]]]))) == [[close(sqrt(5), 2 * sqrt(13))]]
    back = nn.ConvTranspose1d(1, 1, 2, padding=1)
    back.weight = nn.Parameter(torch.tensor([[[1.0, -2.0]]]))
    # of (1, 2) only the middle output is left, w_1 * 2 + w_2 * 1
    assert weights("wanda", task_of(back, ([[[1.0, 2.0]]], [[[0.0]]]))) == [[close(2.0, 2.0)]]
    parted = nn.Conv1d(2, 2, 1, groups=2)
    parted.weight = nn.Parameter(torch.ones(2, 1, 1))
    assert weights("wanda", task_of(parted, ([[[3.0], [4.0]]], [[[0.0], [0.0]]]))) == [[close(3.0)], [close(4.0)]]


def test_synflow_counts_the_paths_through_a_weight_and_keeps_the_flow() -> None:
    first, last = linear((1.0, -2.0), (-3.0, 4.0)), linear((2.0, -1.0))
    model = nn.Sequential(first, nn.ReLU(), last)
    task = task_of(model, ([[7.0, -7.0]] * 2, [[0.0]] * 2))  # whatever the samples are
    scores = plugins.load("criteria", "synflow")().weights(model, ["0.weight", "2.weight"], task)
    # |W2| |W1| 1 = 2 (1 + 2) + 1 (3 + 4) = 13 = the sum of the scores of either layer
    assert scores["0.weight"].tolist() == [close(2.0, 4.0), close(3.0, 4.0)]
    assert scores["2.weight"].tolist() == [close(6.0, 7.0)]
    group = Group("0", "channel", 2, (Slice("0.weight", 0, "produce"), Slice("2.weight", 1, "consume")), (1, 2))
    assert plugins.load("criteria", "synflow")()(model, [group], task)["0"].tolist() == close(6.0, 7.0)


def test_synflow_passes_a_batch_norm_by_its_scale_alone() -> None:
    norm = nn.BatchNorm1d(2, eps=0.0).eval()
    norm.weight, norm.bias = nn.Parameter(torch.tensor([-3.0, 1.0])), nn.Parameter(torch.tensor([-5.0, 0.0]))
    norm.running_mean, norm.running_var = torch.tensor([100.0, -7.0]), torch.tensor([4.0, 1.0])
    model = nn.Sequential(linear((1.0, -2.0), (-3.0, 4.0)), norm, nn.ReLU(), linear((2.0, -1.0)))
    task = task_of(model, ([[0.0, 0.0]] * 2, [[0.0]] * 2))
    scores = plugins.load("criteria", "synflow")().weights(model, ["0.weight", "3.weight"], task)
    assert scores["0.weight"].tolist() == [close(3.0, 6.0), close(3.0, 4.0)]  # the scale of the first row is 3 / 2
    assert scores["3.weight"].tolist() == [close(2 * (1.5 * 3 + 5), 7.0)]
    assert norm.running_mean.tolist() == [100.0, -7.0]


@pytest.mark.parametrize("norm", [nn.LayerNorm(2, eps=0.0), nn.GroupNorm(1, 2, eps=0.0)])
def test_synflow_passes_other_norms_by_scales_that_are_constants(norm: nn.Module) -> None:
    norm.weight, norm.bias = nn.Parameter(torch.tensor([-3.0, 1.0])), nn.Parameter(torch.zeros(2))
    model = nn.Sequential(norm, linear((1.0, -2.0), (-3.0, 4.0)), norm, linear((2.0, -1.0)))
    task = task_of(model, ([[1.0, 0.0]] * 2, [[0.0]] * 2))
    scores = plugins.load("criteria", "synflow")().weights(model, ["1.weight", "3.weight"], task)
    # ones stay ones, scaled to (3, 1); the layer gives (5, 13), whose root mean square is sqrt(97)
    assert scores["3.weight"].tolist() == [close(2 * 3 * 5 / sqrt(97), 13 / sqrt(97))]
    flow = [2 * 3 / sqrt(97), 1 / sqrt(97)]
    assert scores["1.weight"].tolist() == [close(flow[0] * 3, flow[0] * 2), close(flow[1] * 9, flow[1] * 4)]


def test_fpgm_adds_the_distances_of_an_atom_from_the_others() -> None:
    model = linear((0.0, 0.0), (3.0, 4.0), (0.0, 8.0))
    group = Group("rows", "channel", 3, (Slice("weight", 0, "produce"),), (1, 2, 3))
    # 5 + 8, 5 + 5 and 8 + 5, over their mean of 12
    assert plugins.load("criteria", "fpgm")()(model, [group], ATOMS)["rows"].tolist() == close(
        13 / 12, 10 / 12, 13 / 12
    )


def test_fpgm_compares_only_atoms_that_a_slice_holds() -> None:
    model = nn.ModuleDict({"a": linear((0.0,), (3.0,)), "b": linear((1.0,), (2.0,), (5.0,))})
    slices = (Slice("a.weight", 0, "produce", count=2), Slice("b.weight", 0, "produce", first=2))
    scores = plugins.load("criteria", "fpgm")()(model, [Group("both", "channel", 5, slices, (5,))], ATOMS)
    # 3, 3 over the mean 6 / 5 and 5, 4, 7 over the mean 16 / 5
    assert scores["both"].tolist() == close(2.5, 2.5, 25 / 16, 20 / 16, 35 / 16)


def test_padded_tokens_have_no_norm() -> None:
    layer = linear((1.0, 1.0))

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    model, x = Reader(), torch.tensor([[[3.0, 1.0], [9.0, 9.0]], [[4.0, 1.0], [0.0, 1.0]]])
    batch = {"x": x, "attention_mask": torch.tensor([[1, 0], [1, 1]])}

    class Padded:
        def split(self, name: str) -> list[object]:
            return [batch]

        def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            out: Tensor = model(**batch)
            return out

    found = plugins.load("criteria", "wanda")().weights(model, ["layer.weight"], Padded())
    assert found["layer.weight"].tolist() == [close(5.0, sqrt(3))]


@pytest.mark.parametrize("name", ["taylor", "snip", "grasp", "fisher", "movement", "wanda"])
def test_without_data_they_say_what_they_need(name: str) -> None:
    empty = task_of(APART.model)
    with pytest.raises(InputError, match=f"criterion '{name}' needs data, and the calibration split .* no batch"):
        plugins.load("criteria", name)()(APART.model, [GROUP], empty)


@pytest.mark.parametrize("name", ["taylor", "snip", "grasp", "fisher", "movement"])
def test_a_loss_that_is_not_finite_is_said(name: str) -> None:
    with pytest.raises(InputError, match=f"criterion '{name}': the task's loss is not finite on the calibration data"):
        weights(name, task_of(APART.model, ([[float("nan"), 1.0]], [[1.0]])))


def test_a_fine_tuning_that_diverges_names_the_rate() -> None:
    with pytest.raises(InputError, match=r"not finite .* at a learning_rate of 100\.0; a lower one"):
        weights("movement", learning_rate=100.0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("movement", {"steps": 0}, "steps must be a whole number from 1 on, not 0"),
        ("movement", {"steps": 2.5}, "steps must be a whole number from 1 on, not 2.5"),
        ("movement", {"learning_rate": -1.0}, "learning_rate must be above 0"),
        ("fisher", {"batch_size": 0}, "batch_size must be a whole number from 1 on, not 0"),
        ("snip", {"steps": 3}, "unknown option 'steps'"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_criterion({"name": name, "options": options})


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, slope: Tensor) -> Tensor:
        return slope


def test_grasp_names_a_model_that_has_no_second_derivative() -> None:
    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = _Once.apply(super().forward(x))
            return out

    model = Model(2, 1)
    with pytest.raises(InputError, match=r"cannot be differentiated twice .* take another criterion \(snip, taylor\)"):
        weights("grasp", task_of(model, ([[1.0, 2.0]], [[1.0]])))


def test_wanda_names_what_no_layer_reads() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    task = task_of(Scaled(), ([[1.0, 2.0]], [[1.0, 1.0]]))
    with pytest.raises(InputError, match="the weight 'weight' is read by no convolution or linear layer"):
        weights("wanda", task)
    with pytest.raises(InputError, match="no weight that produces group 'rows' is read"):
        plugins.load("criteria", "wanda")()(task.model, [GROUP], task)


def test_synflow_says_that_nothing_flows() -> None:
    class Constant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1.0

    with pytest.raises(InputError, match=r"ones as inputs .* depend on no weight"):
        weights("synflow", task_of(Constant(2, 1), ([[1.0, 2.0]], [[1.0, 1.0]])))
