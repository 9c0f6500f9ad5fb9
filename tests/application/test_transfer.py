"""Points for a deeper or wider sibling: carried over, projected, ranked anew, and said to be approximate."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autoprune
from autoprune.application.delivery import apply_file
from autoprune.application.order import Order
from autoprune.application.transfer import SAME, carried, sibling_of, within
from autoprune.cli import run
from autoprune.costs.macs import Macs
from autoprune.errors import InputError
from autoprune.families import analyze
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front, save_front
from autoprune.front import Point
from autoprune.policy import Policy
from autoprune.run.run import search
from autoprune.space import Space, restrict
from autoprune.structure import Structure
from autoprune.tracing.ops import count_macs
from tests.conftest import ROOT, SMALL
from tests.points import front_over
from tests.siblings import PLANES, bert, known, pictures, point_on, resnet
from tests.small import RandomTask
from tests.synthetic import single_steps
from tests.transformer_models import MODELS

WIDE = (8, 16, 32)
DOCS = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
EVALUATOR = {name: int(value) for name, value in (part.split("=") for part in SMALL)}
DEEP = {
    "task": {"factory": "tests.siblings:DeepDigits"},
    "search": {"trials": 3, "sampler": "random"},
    "evaluator": {**EVALUATOR, "finalists": 0, "sensitivity": 0, "fitness": "refit"},
    "executor": {"kind": "inline"},
}


@pytest.fixture(scope="module")
def policy(finished_run: Path) -> Path:
    return finished_run / "runs" / "digits" / "policy.json"


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The job of a deeper sibling, in a folder that the test stands in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.yaml").write_text(Job.from_dict(DEEP).dump())
    return "deep.yaml"


def step(point: Point, structure: Structure) -> float:
    """The cost of the cheapest step from the point's policy to the next wider one."""
    grids = {g.name: g for g in point.base.groups}
    searched = Structure(tuple(grids[g.name] for g in structure if g.name in grids), structure.ops)
    cost, reached = Macs(searched), point.ratio("macs")
    wider = (p for p in single_steps(searched, point.policy) if Policy.from_array(searched, p.array(searched)) == p)
    return min((float(cost(p.array(searched))) for p in wider), default=1.0) - reached


@pytest.mark.parametrize(("blocks", "planes"), [(2, PLANES), (3, PLANES), (1, PLANES), (2, WIDE)])
def test_a_sibling_is_pruned_to_the_same_share_of_macs(blocks: int, planes: tuple[int, int, int]) -> None:
    point, target = point_on(1 if blocks > 1 else 2), known(blocks, planes)
    moved = carried(point, target)
    moved.policy.check(Structure(moved.base.groups, ()))
    reached = moved.ratio("macs")
    assert reached <= point.ratio("macs") < reached + step(moved, target.structure)
    told = moved.base.space["transfer"]
    assert (told["wanted"], told["reached"]) == (point.ratio("macs"), reached)
    assert sum(told["groups"].values()) == len(target.structure)
    assert told["from"]["structure"] == point.base.structure_fingerprint


def test_the_lines_of_the_docs_apply_a_point_to_a_sibling_with_its_atoms_ranked_anew() -> None:
    target, inputs = resnet(2), pictures()
    task = RandomTask(target, tuple(inputs[0].shape[1:]))
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "transfer(" in text)
    spoken: dict[str, Any] = {"autoprune": autoprune, "point": point_on(1), "sibling": target, "task": task}
    exec(code, {**spoken, "example_inputs": inputs}, spoken)
    moved, repaired = spoken["moved"], spoken["small"]
    assert count_macs(repaired, inputs) == moved.costs["macs"]
    with pytest.raises(InputError, match="has other weights than the policy was found on"):
        autoprune.apply(moved, target, inputs)
    with pytest.warns(UserWarning, match="only slices"):
        small = autoprune.apply(moved, target, inputs, criterion="l1_norm")
    assert count_macs(small, inputs) == moved.costs["macs"]
    assert sum(p.numel() for p in small.parameters()) == moved.costs["params"]


@pytest.mark.parametrize(
    ("layers", "model"), [(4, "BertModel"), (1, "BertModel"), (4, "BertForSequenceClassification")]
)
def test_a_bert_of_other_depth_gets_heads_neurons_and_blocks_by_depth(layers: int, model: str) -> None:
    inputs = MODELS["bert"].example()
    source = bert(2)
    structure = analyze(source, inputs)
    (point,) = front_over(source, inputs, structure=structure)
    widths = {"head": (4, 2), "neuron": (24, 12), "block": (1, 1)}
    given = {g.name: widths[g.kind][int(".1." in g.name)] for g in structure}
    given |= {"encoder.layer.1.output": 0, "encoder.layer.1.intermediate.dense": 48}
    macs = Macs(structure)
    policy = Policy.of(given)
    ratio = float(macs(policy.array(structure)))
    costs = {**point.costs, "macs": round(ratio * macs.dense), "macs_ratio": ratio}
    keep = {name: tuple(range(width)) for name, width in given.items()}
    point = replace(point, policy=policy, costs=costs, keep=keep)
    target = bert(layers, model)
    moved = autoprune.transfer(point, target, inputs)
    found = {name.removeprefix("bert."): width for name, width in moved.policy.widths}
    feed_forward = [found[f"encoder.layer.{i}.output"] for i in range(layers)]
    assert feed_forward == {4: [1, 1, 0, 0], 1: [1]}[layers]
    assert all(found[f"encoder.layer.{i}.attention"] for i in range(layers))
    heads = [found[f"encoder.layer.{i}.attention.self.query"] for i in range(layers)]
    assert heads == sorted(heads, reverse=True)
    assert moved.ratio("macs") <= point.ratio("macs")
    with pytest.warns(UserWarning, match="only slices"):
        small = autoprune.apply(moved, target, inputs, criterion="l1_norm")
    assert count_macs(small, inputs) == moved.costs["macs"]


def test_the_space_of_the_policy_holds_for_the_sibling() -> None:
    """Steps, floors, and what was not to be pruned."""
    source, target, inputs = resnet(1), known(2, WIDE), pictures()
    only = restrict(known(1).structure, Space(("channel",), ("layer*.conv1",), multiple_of=2, max_sparsity=0.5))
    (point,) = front_over(source, inputs, structure=only)
    spoken = {**point.base.space, "multiple_of": 2}
    point = replace(point, base=replace(point.base, space=spoken))
    moved = carried(point, target)
    assert [g.name for g in moved.base.groups] == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1)]
    assert all(g.kind == "channel" and w % 2 == 0 and 2 * w >= g.width for g in moved.base.groups for w in g.grid)
    assert moved.base.space["transfer"]["groups"]["left dense"] == 1, "the stream"
    odd = replace(point, base=replace(point.base, space={**spoken, "multiple_of": "many"}))
    with pytest.raises(InputError, match="multiple_of must be 'auto' or an integer"):
        carried(odd, target)


def test_another_cost_is_met_and_one_that_cannot_be_computed_gives_way_to_macs() -> None:
    point = point_on(2, seed=4)
    for cost, met in (("params", "params"), ("latency", "macs"), ("os:getcwd", "macs")):
        moved = carried(point, known(1), cost)
        told = moved.base.space["transfer"]
        assert told["cost"] == met
        assert told["wanted"] == point.ratio(met) >= moved.ratio(met)


def test_a_ratio_that_the_sibling_cannot_reach_names_what_it_can() -> None:
    point = point_on(2)
    low = replace(point, costs={**point.costs, "macs": 1, "macs_ratio": 1 / point.base.costs["macs"]})
    with pytest.raises(InputError, match=r"--transfer of point p00 to resnet1: .* out of reach") as caught:
        carried(low, known(1))
    assert "\n" not in str(caught.value)


def test_strangers_pruned_and_wrapped_models_and_the_own_structure_are_told_apart() -> None:
    inputs, text = pictures(), MODELS["bert"].example()
    source, point = resnet(1), point_on(1)
    with pytest.raises(InputError, match=r"no sibling of the policy's: .* 4 blocks .* none of them correspond"):
        autoprune.transfer(point, bert(2), text)
    with pytest.raises(InputError, match="no sibling of the policy's"):
        autoprune.transfer(point, nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    with pytest.warns(UserWarning, match="only slices"):
        small = autoprune.apply(point, source, inputs)
    with pytest.raises(InputError, match="was applied to this model before"):
        autoprune.transfer(point, small, inputs)
    with pytest.warns(UserWarning, match=re.escape(SAME)):
        assert autoprune.transfer(point, source, inputs) is point


def test_tied_layers_of_a_container_stay_tied() -> None:
    from autoprune.deploy import searched

    small = MODELS["llama"]
    deeper = replace(small, settings={**small.settings, "num_hidden_layers": 3})
    dense, inputs = small.build(), small.example()
    structure = searched(analyze(dense, inputs), Space(), "hf-uniform")
    (point,) = front_over(dense, inputs, structure=structure)
    moved = autoprune.transfer(point, deeper.build(), inputs, deploy="hf-uniform")
    assert [name for name, _ in moved.policy.widths] == [name for name, _ in point.policy.widths]
    assert moved.ratio("macs") <= point.ratio("macs")
    sibling = sibling_of(point.base, deeper.build(), inputs, "deeper", None)
    assert within(point.base, sibling, "hf-uniform").structure.names == tuple(g.name for g in moved.base.groups)
    free = autoprune.transfer(point, deeper.build(), inputs)
    assert {g.name for g in free.base.groups} == {g.name for g in analyze(deeper.build(), inputs) if g.kind != "block"}


def test_the_command_carries_over_says_that_it_is_approximate_and_shows_losses_beside(
    policy: Path, job_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = re.findall(r"^autoprune (apply .* --transfer .*)$", DOCS, re.MULTILINE)
    told_so = line.replace("runs/resnet20/policy.json", str(policy)).replace("resnet32.yaml", job_file).split()
    command = [*(word for word in told_so if word != "--transfer"), "--finetune", "none"]
    assert run(command) == 2
    refused = capsys.readouterr().err
    assert "the policy is for another structure: " in refused
    assert refused.endswith("--transfer carries it over to a sibling, approximately (autoprune.transfer in Python)\n")
    assert run([*command, "--transfer"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    point = load_front(policy).select(macs=0.5)
    facts = json.loads(Path("small/apply.json").read_text())
    told = facts["transfer"]
    assert (facts["point"], facts["promised"], facts["atoms"]) == (point.id, None, "ranked anew (another structure)")
    assert told["approximate"] is True
    assert set(told) == {"approximate", "from", "groups", "cost", "wanted", "reached", "said", "losses"}
    assert told["from"] == {
        "model": point.base.model,
        "structure": point.base.structure_fingerprint,
        "weights": point.base.weights_fingerprint,
    }
    assert set(told["groups"]) == {"direct", "interpolated", "mean", "left dense"}
    assert told["reached"] == pytest.approx(facts["macs_ratio"])
    assert told["reached"] <= told["wanted"] == point.ratio("macs")
    losses = told["losses"]
    assert set(losses) == {"name", "transfer", "uniform"}
    assert losses["transfer"] == pytest.approx(facts["validation"]["loss"]["loss"], rel=1e-3)
    beside = f"transferred {losses['transfer']:.4g}, uniform {losses['uniform']:.4g}"
    card = Path("small/README.md").read_text()
    for text in (shown, card):
        assert told["said"] in text
        assert beside in text
    kept = load_front("small/policy.json")[0]
    assert kept.losses["validation"] == facts["validation"]["loss"]
    assert kept.base.space["transfer"]["said"] == told["said"]
    loaded = autoprune.load("small", factory="tests.siblings:DeepDigits")
    assert sum(p.numel() for p in loaded.parameters()) == facts["costs"]["params"]["pruned"]
    with pytest.warns(UserWarning, match="was finished by the same command before"):
        assert run([*command, "--transfer"]) == 0


def test_a_search_of_its_own_stands_beside_where_it_lies_in_its_usual_folder(policy: Path, job_file: str) -> None:
    own = search(Job.load(job_file), out=Path("runs") / "deep").finish()
    order = Order(transfer=True)
    at = min(load_front(policy), key=lambda p: -p.ratio("macs")).id
    told = apply_file(policy, Job.load(job_file), [at], Path("small"), order)["transfer"]
    best = own.front.select(macs=told["wanted"])
    assert told["losses"]["search"] == pytest.approx(best.loss(), rel=1e-3)
    assert told["losses"]["name"] == "kl"
    Path("runs/deep/policy.json").write_text("{}")  # it is nobody's input, so it is no mistake
    told = apply_file(policy, Job.load(job_file), [at], Path("small"), order)["transfer"]
    assert "search" not in told["losses"]


def test_the_own_structure_is_applied_as_without_and_that_is_said(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(policy.parent / "job.yaml")
    command = ["apply", str(policy), "--task", job, "--at", "macs=0.5", "--finetune", "none"]
    assert run([*command, "--out", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    with pytest.warns(UserWarning, match=re.escape(SAME)):
        assert run([*command, "--out", str(tmp_path / "moved"), "--transfer"]) == 0
    assert SAME in " ".join(capsys.readouterr().out.split())
    plain, moved = (json.loads((tmp_path / name / "apply.json").read_text()) for name in ("plain", "moved"))
    assert moved["transfer"] == {"approximate": False, "said": SAME}
    assert SAME in (tmp_path / "moved" / "README.md").read_text()
    for key in ("point", "test", "validation", "promised", "atoms", "costs", "recipe"):
        assert plain[key] == moved[key]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "moved")]
    assert weights[0] == weights[1]
    assert plain["request"] != moved["request"]


@pytest.mark.filterwarnings("ignore:without a task autoprune.apply only slices")
def test_several_points_without_data_and_a_container(tmp_path: Path) -> None:
    source, inputs, structure = resnet(1), pictures(), known(1).structure
    front = front_over(source, inputs, 2, structure)
    second = replace(front_over(source, inputs, 3, structure)[0], id="p01", base=front.base)
    save_front(replace(front, points=(front[0], second)), tmp_path / "policy.json")
    order = Order(criterion="l1_norm", deploy="tensorrt", transfer=True)
    told = apply_file(tmp_path / "policy.json", "tests.siblings:wide_resnet", ["p00", "p01"], tmp_path / "out", order)
    assert list(told["points"]) == ["p00", "p01"]
    for name in told["points"]:
        facts = told["points"][name]["transfer"]
        assert "losses" not in facts, "there is nothing to measure them on"
        kept = load_front(tmp_path / "out" / name / "policy.json")[0]
        assert all(w % 8 == 0 or w == g.width for g in kept.base.groups if g.kind == "channel" for w in g.grid)
    with pytest.raises(InputError, match="no sibling of the policy's"):
        apply_file(tmp_path / "policy.json", "tests.siblings:stranger", "p00", tmp_path / "other", order)
    assert not (tmp_path / "other").exists()


def test_weights_in_8_bits_are_carried_over_as_such() -> None:
    source, sibling, inputs = resnet(1), resnet(2), pictures()
    structure = restrict(analyze(source, inputs), Space(bits=(32, 8)))
    (point,) = front_over(source, inputs, structure=structure)
    eight = {g.name: 8 if g.matrices else point.policy.as_dict()[g.name] for g in structure}
    keep = {**point.keep, **{g.name: tuple(range(8)) for g in structure if g.matrices}}
    moved = autoprune.transfer(replace(point, policy=Policy.of(eight), keep=keep), sibling, inputs)
    found = {g.name: moved.policy.as_dict()[g.name] for g in moved.base.groups if g.matrices}
    assert found
    assert set(found.values()) == {8}
