"""Latency: timing in rounds, tables of single operations, the fit to whole models, and the cost that searches see."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.allocation.budget import Projector
from autoprune.costs import build_cost
from autoprune.costs._latency_features import Features
from autoprune.costs._latency_table import LatencyTable, nearest_levels, thinned
from autoprune.costs.latency import Latency
from autoprune.errors import InputError
from autoprune.latency.fit import fit, solve
from autoprune.latency.probes import combinations, filled, knots, load_operation, narrowed, probes
from autoprune.latency.runtime_here import batched, resolve
from autoprune.latency.timing import measure_ratios, summarise
from autoprune.latency.whole_models import Clocked, fit_latency, remeasure, sample_policies, table_key
from autoprune.policy import Policy
from autoprune.runtimes._onnx_models import OnnxFamily
from autoprune.space import Space, restrict
from autoprune.structure import Structure
from autoprune.tracing.analyze import analyze
from autoprune.tracing.one_thread import one_thread
from autoprune.tracing.slim import slim
from tests.families import FAMILIES
from tests.synthetic import chain, single_steps
from tests.tables import latency_table

HAS_ONNX = all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs the extra autoprune[onnx]")
INSTALLED = ["eager", pytest.param("onnxruntime", marks=needs_onnx)]


def wide() -> nn.Module:
    """Convolutions that take long enough for their widths to show."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 96, 3, padding=1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(96, 64, 3, padding=1), *head).eval()


INPUTS = (torch.zeros(2, 3, 24, 24),)


def structure_of(model: nn.Module, inputs: tuple[Tensor, ...] = INPUTS, step: int = 8) -> Structure:
    return restrict(analyze(model, inputs), Space(max_sparsity=0.9, multiple_of=step))


class Clockwork:
    """A clock that only the runners move: timing without a machine."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[int]()

    def __call__(self) -> float:
        return self.now

    def runner(self, index: int, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(index)
            self.now += seconds()

        return run


def test_a_machine_that_slows_down_for_some_rounds_does_not_change_the_ratios() -> None:
    clock = Clockwork()
    slow = np.random.default_rng(0)
    factor = [1.0]

    def seconds(base: float) -> Callable[[], float]:
        return lambda: base * factor[0]

    def dense() -> float:
        return 0.02 * factor[0]

    runners = [clock.runner(1, seconds(0.01)), clock.runner(2, seconds(0.03))]
    for _ in range(3):
        factor[0] = float(slow.uniform(1, 5))
        timings = measure_ratios(clock.runner(0, dense), runners, np.random.default_rng(1), clock, rounds=(5, 5))
        assert [t.ratio for t in timings] == pytest.approx([0.5, 1.5])
        assert [t.iqr for t in timings] == pytest.approx([0.0, 0.0], abs=1e-9)
        assert timings[0].dense_ms == pytest.approx(20 * factor[0])


def test_a_ratio_is_taken_within_a_round_and_its_median_over_rounds() -> None:
    speeds = np.array([1.0, 4.0, 2.0, 0.5, 8.0])  # of the machine, round by round
    half, odd = summarise(np.stack([0.02 * speeds, 0.01 * speeds, 0.02 * speeds * [1.0, 1.1, 1.2, 1.3, 9.0]], axis=1))
    assert (half.ratio, half.iqr) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))
    assert (odd.ratio, odd.iqr) == (pytest.approx(1.2), pytest.approx(0.2))
    assert (half.dense_ms, half.rounds) == (pytest.approx(40.0), 5)


def test_every_round_times_everybody_in_an_order_of_its_own() -> None:
    clock = Clockwork()
    runners = [clock.runner(i, lambda: 1.0) for i in range(5)]
    timings = measure_ratios(runners[0], runners[1:], np.random.default_rng(0), clock, rounds=(6, 6))
    rounds = np.array(clock.calls).reshape(6, 5)
    assert timings[0].rounds == 6
    assert all(sorted(r) == list(range(5)) for r in rounds.tolist())
    assert len({tuple(r) for r in rounds.tolist()}) > 3


def test_much_more_work_takes_much_more_time() -> None:
    x = torch.randn(128, 128)

    def work(n: int) -> Callable[[], object]:
        return lambda: [x @ x for _ in range(n)]

    with one_thread():
        runners = [work(5), work(100)]
        timings = measure_ratios(work(20), runners, np.random.default_rng(0), time.process_time, rounds=(7, 7))
    assert 0.1 < timings[0].ratio < 0.6
    assert 2.0 < timings[1].ratio < 12.0


def test_lines_give_back_a_constant_plus_a_product_and_the_step_of_an_alignment() -> None:
    rows, columns = tuple(range(2, 49)), tuple(range(4, 65))
    odd = np.where(np.asarray(rows) % 8, 1.4, 1.0)
    truth = 0.02 + 1e-4 * np.outer(rows * odd, columns)
    timed = {(r, c): truth[rows.index(r), columns.index(c)] for r, c in combinations(rows, columns)}
    assert len(timed) < 0.2 * truth.size
    np.testing.assert_allclose(filled(rows, columns, timed), truth, rtol=1e-9)
    few = {pair: 1.0 + pair[0] for pair in combinations((1, 2, 3), (1,))}
    assert filled((1, 2, 3), (1,), few).tolist() == [[2.0], [3.0], [4.0]]


def test_levels_keep_the_alignments_apart() -> None:
    levels = thinned(range(1, 513), 40)
    assert len(levels) <= 42
    assert levels[0] == 1
    assert levels[-1] == 512
    place = nearest_levels(levels, 512)
    nearest = [levels[i] for i in place]
    assert all((nearest[s] % 16 == 0) == (s % 16 == 0) for s in range(1, 513))
    assert all(nearest[s] == s for s in levels)
    assert set(knots(levels)) <= {s for s in levels if s % 16 == 0}


def test_the_fit_finds_the_mix_and_is_a_function_of_its_data() -> None:
    rng = np.random.default_rng(0)
    features = {"ops": rng.uniform(0.2, 1, 30), "elements": rng.uniform(0.2, 1, 30)}
    ratios = 0.3 + 0.5 * features["ops"] + 0.2 * features["elements"]
    fitted = fit(features, ratios)
    assert fitted.coefficients == pytest.approx({"ops": 0.5, "elements": 0.2}, abs=1e-4)
    assert fitted.held_out_error < 1e-4
    assert fitted.rank_correlation == pytest.approx(1.0)
    noisy = ratios * rng.normal(1, 0.02, 30)
    assert fit(features, noisy) == fit(features, noisy)
    assert 0.01 < fit(features, noisy).held_out_error < 0.03


def test_the_fit_weighs_errors_relative_to_the_measured_ratio() -> None:
    features, ratios = np.array([[0.1], [0.5], [0.9], [0.2]]), np.array([0.15, 0.9, 0.97, 0.6])
    shares = np.linspace(0, 1, 10_001)[:, None]
    errors = np.sum(((1 + shares * (features[:, 0] - 1)) / ratios - 1) ** 2, axis=1)
    assert solve(features, ratios)[0] == pytest.approx(float(shares[np.argmin(errors), 0]), abs=2e-3)


def test_coefficients_are_never_negative_and_leave_no_negative_constant() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(0.2, 1, (30, 2))
    for ratios in (1.3 * features[:, 0] + 0.01, 1.5 - features[:, 0]):
        coefficients = solve(features, ratios)
        assert np.all(coefficients >= 0)
        assert coefficients.sum() <= 1 + 1e-9
    with pytest.raises(InputError, match="3 or more measured ratios"):
        fit({"ops": np.ones(2)}, np.ones(2))


def test_sampled_policies_differ_are_on_the_grids_and_cover_them() -> None:
    structure = chain()
    policies = sample_policies(structure, 24, np.random.default_rng(0))
    assert len(set(policies)) == 24
    assert Policy.dense(structure) not in policies
    for policy in policies:
        policy.check(structure)
    macs = build_cost("macs", structure)(np.stack([p.array(structure) for p in policies]))
    assert macs.min() < 0.2
    assert macs.max() > 0.8
    assert policies == sample_policies(structure, 24, np.random.default_rng(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runtime", INSTALLED)
def test_every_conv_and_linear_is_timed_at_its_narrowest_and_widest(family: str, runtime: str) -> None:
    f = FAMILIES[family]
    model = f.build().eval()
    structure = restrict(analyze(model, f.inputs()), Space(max_sparsity=0.9))
    found = probes(model, f.inputs(1), structure)
    timed = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    wanted = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, timed)}
    assert {weight for p in found for weight in p.uses} == wanted
    bench = resolve(runtime, torch.device("cpu"))
    for probe in found:
        for sizes in {(min(probe.rows), min(probe.columns)), (max(probe.rows), max(probe.columns))}:
            load_operation(probe, sizes, bench)()


def test_a_weight_that_runs_three_times_counts_three_times() -> None:
    f = FAMILIES["shared"]
    structure = restrict(analyze(f.build(), f.inputs()), Space(max_sparsity=0.9))
    uses = {weight: calls for p in probes(f.build(), f.inputs(1), structure) for weight, calls in p.uses.items()}
    assert (uses["stem.weight"], uses["shared.weight"], uses["both.weight"]) == (1, 3, 2)


def test_a_narrowed_operation_computes_the_first_channels_and_leaves_the_model_alone() -> None:
    conv, depthwise = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    x = torch.randn(1, 8, 5, 5)
    wanted = nn.functional.conv2d(x[:, :4], conv.weight[:5, :4], conv.bias[:5] if conv.bias is not None else None)
    torch.testing.assert_close(narrowed(conv, (5, 4))(x[:, :4]), wanted)
    torch.testing.assert_close(narrowed(depthwise, (3, 1))(x[:, :3]), depthwise(x)[:, :3])
    assert (conv.in_channels, conv.out_channels, depthwise.groups) == (6, 8, 8)
    assert all(torch.equal(before[k], v) for k, v in conv.state_dict().items())


def test_the_features_add_up_what_the_table_says() -> None:
    structure = chain(5)
    table = latency_table(structure)
    policy = sample_policies(structure, 8, np.random.default_rng(0))[-1]
    dense = Policy.dense(structure)

    def literal(p: Policy) -> float:
        sizes = {s.tensor: [0, 0] for g in structure.groups for s in g.slices}  # 0: does not shrink
        for g in structure.groups:
            for s in g.slices:
                sizes[s.tensor][s.dim] = p.as_dict()[g.name]
        total = 0.0
        for op in table.ops:
            weight, calls = op.uses[0]
            rows, columns = (n or frozen[-1] for n, frozen in zip(sizes[weight], (op.rows, op.columns), strict=True))
            total += calls * op.ms[op.rows.index(rows)][op.columns.index(columns)]
        return total

    got = Features(structure, table.ops)(policy.array(structure))["ops"]
    assert float(got) == pytest.approx(literal(policy) / literal(dense))


def test_a_predicted_latency_takes_microseconds() -> None:
    structure = chain(60)
    cost, widths = Latency(structure, latency_table(structure)), Policy.dense(structure).array(structure)
    seconds = []
    for _ in range(7):
        start = time.process_time()
        for _ in range(200):
            cost(widths)
        seconds.append((time.process_time() - start) / 200)
    assert min(seconds) < 50e-6


def test_a_width_that_suits_the_kernels_is_predicted_faster_than_a_narrower_one() -> None:
    structure = chain(4)
    cost = build_cost("latency", structure, latency_table(structure))
    dense = Policy.dense(structure).array(structure)
    aligned, narrower = dense.copy(), dense.copy()
    aligned[1], narrower[1] = dense[1] - 8, dense[1] - 9
    assert not cost.monotone
    assert cost(aligned) < cost(narrower)


def test_latency_limits_a_search_on_macs_and_is_a_range_by_itself() -> None:
    structure = chain()
    costs = {"macs": build_cost("macs", structure), "latency": Latency(structure, latency_table(structure))}
    projector, rng = Projector(structure, costs), np.random.default_rng(0)
    for limits in ({"macs": 0.6, "latency": 0.5}, {"latency": 0.5}, {"latency": 0.2}):
        for _ in range(5):
            policy = projector.project(rng.random(len(structure)), limits)
            policy.check(structure)
            got = {name: float(costs[name](policy.array(structure))) for name in limits}
            assert all(got[name] <= limit + 1e-12 for name, limit in limits.items())
            assert got["latency"] > 0.8 * limits["latency"]
            wider = np.stack([p.array(structure) for p in single_steps(structure, policy)])
            if "macs" in limits:
                assert np.sum(np.all([costs[n](wider) <= limit for n, limit in limits.items()], axis=0)) <= 2
    with pytest.raises(InputError, match="no widths within"):
        projector.project(np.ones(len(structure)), {"latency": 0.001})


def test_a_table_comes_back_from_its_json_and_nothing_else_does() -> None:
    structure = chain(3)
    table = latency_table(structure)
    again = LatencyTable.from_json(table.to_json())
    assert again == table
    assert "ops" not in again.summary()
    for text in ("", "[]", "{}", '{"schema": "autoprune/latency/1"}', '{"schema": "autoprune/latency/9"}'):
        with pytest.raises(InputError, match="latency table") as caught:
            LatencyTable.from_json(text)
        assert "\n" not in str(caught.value)


def test_latency_without_a_table_or_with_one_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="needs a measured latency table"):
        build_cost("latency", chain(3))
    with pytest.raises(InputError, match="measured on another model"):
        build_cost("latency", chain(3), latency_table(chain(4)))
    with pytest.raises(InputError, match="did you mean 'latency'"):
        build_cost("latncy", chain(3))


@pytest.mark.parametrize("runtime", INSTALLED)
def test_a_fitted_table_ranks_models_as_the_clock_does_and_the_lent_model_comes_back(runtime: str) -> None:
    model = wide().train()
    structure = structure_of(model, step=16)
    state, threads = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_num_threads()
    random_state = torch.get_rng_state()
    table = fit_latency(model, INPUTS, structure, Clocked(runtime, models=20), seconds=0.05)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert (table.runtime, table.batch_size, table.structure) == (runtime, 1, structure.fingerprint)
    assert table.dense_ms > 0
    assert table.rank_correlation > 0.6
    cost = build_cost("latency", structure, LatencyTable.from_json(table.to_json()))
    shares = [1 / 8, 1 / 2, 1]
    policies = [Policy.of({g.name: g.grid[int(s * len(g.grid)) - 1] for g in structure}) for s in (0.5, 1)]
    policies.insert(0, Policy.of({g.name: g.grid[0] for g in structure}))
    predicted = cost(np.stack([p.array(structure) for p in policies]))
    assert list(np.argsort(predicted)) == list(range(len(shares)))
    measured = remeasure(model, INPUTS, structure, [*policies, policies[0]], Clocked(table.runtime), seconds=0.1)
    assert list(measured) == policies
    assert measured[policies[0]].ratio < measured[policies[2]].ratio
    assert 0.6 < measured[policies[2]].ratio < 1.6
    assert all(t.iqr >= 0 and t.rounds >= 7 for t in measured.values())


def test_example_inputs_are_repeated_or_cut_to_the_batch() -> None:
    inputs = (torch.arange(6.0).reshape(3, 2), {"mask": torch.ones(3, 1), "scale": torch.tensor(2.0), "flag": True})
    for n in (1, 2, 7):
        x, rest = batched(inputs, n, torch.device("cpu"))
        assert x.shape == (n, 2)
        assert rest["mask"].shape == (n, 1)
        assert (rest["scale"].item(), rest["flag"]) == (2.0, True)
    with pytest.raises(InputError, match="dimension 0 is the sample"):
        batched((3,), 1, torch.device("cpu"))


def test_a_table_is_kept_under_all_that_decides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide()
    structure, finer = structure_of(model), structure_of(model, step=4)
    asked = Clocked("eager")
    first = table_key(model, INPUTS, structure, asked)
    assert first == table_key(wide(), INPUTS, structure, asked)
    half = (torch.zeros(2, 3, 24, 24).half(),)
    others = {
        table_key(model, INPUTS, finer, asked),
        table_key(model, half, structure, asked),
        table_key(model, INPUTS, structure, asked._replace(runtime="compile")),
        table_key(model, INPUTS, structure, asked._replace(batch_size=2)),
        table_key(model, INPUTS, structure, asked._replace(models=25)),
        table_key(model, INPUTS, structure, asked, seed=1),
    }
    monkeypatch.setattr("autoprune.latency.whole_models.device_name", lambda device: "another machine")
    others.add(table_key(model, INPUTS, structure, asked))
    monkeypatch.setattr("importlib.metadata.version", lambda package: "99")
    others.add(table_key(model, INPUTS, structure, asked))
    assert len(others - {first}) == 8


def test_a_table_of_two_threads_is_another_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.latency.runtime_here.usable_cores", lambda: 2)
    model, asked = wide(), Clocked("eager", threads=2)
    structure = structure_of(model)
    one = asked._replace(threads=1)
    assert table_key(model, INPUTS, structure, asked) != table_key(model, INPUTS, structure, one)
    with pytest.raises(InputError, match=r"latency\.threads: 3 threads, but this process may use 2 cores here: take 2"):
        table_key(model, INPUTS, structure, asked._replace(threads=3))
    assert resolve("eager", torch.device("cpu"), 2).clock is time.perf_counter
    assert resolve("eager", torch.device("cpu")).clock is time.process_time


def test_an_extra_that_is_missing_is_called_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    with pytest.raises(InputError, match=r"openvino needs openvino: pip install 'autoprune\[openvino\]'"):
        resolve("openvino", torch.device("cpu"))


def test_runtimes_are_named_and_auto_says_which() -> None:
    cpu = torch.device("cpu")
    assert resolve("eager", cpu).name == "eager"
    assert resolve("auto", cpu).name == ("onnxruntime" if HAS_ONNX else "eager")
    assert resolve("auto", torch.device("cuda")).name == "eager"
    with pytest.raises(InputError, match="unknown runtime 'tensorrt'"):
        resolve("tensorrt", cpu)


@pytest.mark.skipif(HAS_ONNX, reason="the extra is installed")
def test_a_missing_extra_is_named() -> None:
    with pytest.raises(InputError, match=r"onnxruntime.*pip install 'autoprune\[onnx\]'"):
        resolve("onnxruntime", torch.device("cpu"))


class Picky(nn.Module):
    """Runs in eager mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = wide()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise RuntimeError("not to be exported")
        y: Tensor = self.net(x)
        return y


@needs_onnx
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recut_graph_answers_as_the_slim_model(family: str) -> None:
    f = FAMILIES[family]
    model = f.build().eval()
    structure = restrict(analyze(model, f.inputs()), Space(max_sparsity=0.9))
    onnx_family = OnnxFamily(model, f.inputs(1))
    onnx_family.load(model)()
    small = copy.deepcopy(model)
    slim(small, structure, {g.name: range(g.grid[len(g.grid) // 2]) for g in structure})
    with torch.no_grad():
        wanted = small(*f.inputs(1))
    got = onnx_family.load(small)()
    assert isinstance(got, list)
    torch.testing.assert_close(torch.from_numpy(got[0]), wanted, rtol=1e-3, atol=1e-4)


@needs_onnx
def test_a_model_that_cannot_be_exported_is_refused_in_one_line_and_auto_goes_eager() -> None:
    model = Picky().eval()
    structure = structure_of(model, step=16)
    policy = Policy.of({g.name: g.grid[0] for g in structure})
    with pytest.raises(InputError, match=r"onnxruntime cannot run this model.*set latency.runtime: eager") as caught:
        remeasure(model, INPUTS, structure, [policy], Clocked("onnxruntime"))
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="measured in eager mode"):
        remeasure(model, INPUTS, structure, [policy], seconds=0.05)
