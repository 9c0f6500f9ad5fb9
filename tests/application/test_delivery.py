"""What `apply` leaves: folders that stand alone, several at once, finished ones kept; models by name, without data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import autoprune
from autoprune.application import delivery
from autoprune.application.delivery import apply_file
from autoprune.application.order import Order
from autoprune.application.sources import drawn_inputs, source_of_name
from autoprune.application.training import Training
from autoprune.errors import InputError, RunError
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from tests.golden_models import mixed

GOLDEN = Path(__file__).parents[1] / "goldens" / "0.1.0" / "mixed.json"
MIXED = "tests.golden_models:mixed"
NONE = Training.of("none", None)
SLICED = pytest.mark.filterwarnings("ignore:without a task autoprune.apply only slices")


@pytest.fixture(scope="module")
def policy(finished_run: Path) -> Path:
    return finished_run / "runs" / "digits" / "policy.json"


@pytest.fixture(scope="module")
def the_job(policy: Path) -> Job:
    return Job.load(policy.parent / "job.yaml")


def test_several_points_have_a_folder_each_and_finished_ones_are_kept(
    policy: Path, the_job: Job, tmp_path: Path
) -> None:
    first, second = (p.id for p in load_front(policy).points[:2])
    apply_file(policy, the_job, [first, second], tmp_path, Order(training=NONE))
    assert {p.name for p in tmp_path.iterdir()} == {first, second}
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    (tmp_path / second / "model.safetensors").unlink()  # as if that one were not finished
    order = Order(training=NONE)
    with pytest.warns(UserWarning, match="was finished by the same command before"):
        told = apply_file(policy, the_job, [first, second, first], tmp_path, order)
    assert list(told["points"]) == [first, second]
    assert told["points"][first] == json.loads((tmp_path / first / "apply.json").read_text())
    again = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert {p for p, stamp in again.items() if stamps[p] == stamp and p.is_file()} == set((tmp_path / first).iterdir())
    changed = apply_file(policy, the_job, [first, second], tmp_path, Order(training=Training.of("full", 0.0)))
    assert changed["points"][first]["request"] != told["points"][first]["request"], "another command is no resume"


def test_the_card_tells_what_it_is_and_its_figures_are_those_of_apply_json(
    policy: Path, the_job: Job, tmp_path: Path
) -> None:
    facts = apply_file(policy, the_job, "macs=0.6", tmp_path / "small", Order(training=NONE))
    text = (tmp_path / "small" / "README.md").read_text()
    assert text.startswith(f"# {load_front(policy).base.model}, pruned to {facts['macs_ratio']:.1%}")
    scores = facts["test"]
    dense, pruned = (scores[name]["accuracy"] for name in ("dense", "pruned"))
    assert f"| accuracy on the test split | {dense:.4g} | {pruned:.4g} |" in text
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert facts["bytes"]["pruned"] == size < facts["bytes"]["dense"]
    assert f"{size:,}" in text
    latency = facts["latency"]
    assert latency["runtime"] == "eager"
    assert latency["ratio"] > 0.0
    assert f"Latency is {latency['ratio']:.2f} of dense" in text
    assert str(tmp_path) not in text


@SLICED
def test_a_factory_alone_is_enough_to_cut_by_shapes_and_the_card_says_what_is_missing(tmp_path: Path) -> None:
    point = load_front(GOLDEN)[0]
    facts = apply_file(GOLDEN, MIXED, point.id, tmp_path / "small")
    assert (facts["test"], facts["validation"], facts["model"]) == (None, None, MIXED)
    assert "Cut by shapes alone, without data" in (tmp_path / "small" / "README.md").read_text()
    small = autoprune.load(tmp_path / "small", factory=mixed)
    assert sum(p.numel() for p in small.parameters()) == point.costs["params"]
    with pytest.raises(InputError, match="--finetune full trains on data"):
        apply_file(GOLDEN, MIXED, point.id, tmp_path / "other", Order(training=Training.of("full", 1.0)))


PLAIN = """
import sys
sys.modules["autoprune"] = None  # as where it is not installed
import re, torch
from tests.golden_models import mixed
card = open(f"{sys.argv[1]}/README.md").read()
code = re.findall("```python\\n(.*?)```", card, re.S)[1]
build = mixed
exec(code.replace("FOLDER", sys.argv[1]))
x = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(x), sys.argv[3])
"""


@SLICED
def test_the_recipe_of_the_card_builds_the_model_where_autoprune_is_not_installed(tmp_path: Path) -> None:
    apply_file(GOLDEN, MIXED, load_front(GOLDEN)[0].id, tmp_path / "small")
    small = autoprune.load(tmp_path / "small", factory=mixed)
    (x,) = drawn_inputs(load_front(GOLDEN).base.inputs, small)
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("small", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", PLAIN, *files], check=True, cwd=Path(__file__).parents[2])
    with torch.no_grad():
        assert torch.equal(small(x), torch.load(tmp_path / "y.pt", weights_only=True))


@SLICED
@pytest.mark.parametrize("kind", ["safetensors", "wrapped checkpoint"])
def test_other_weights_without_data_want_a_criterion_that_looks_at_weights_alone(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = mixed()
    nn.init.normal_(next(other.parameters()))
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(other.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}, "epoch": 3}, path)
    at = load_front(GOLDEN)[0].id
    with pytest.raises(InputError, match="looks at weights alone: bn_scale, fpgm, l1_norm, l2_norm, random"):
        apply_file(GOLDEN, MIXED, at, tmp_path / "small", Order(weights=path))
    facts = apply_file(GOLDEN, MIXED, at, tmp_path / "small", Order(weights=path, criterion="l1_norm"))
    assert facts["atoms"] == "ranked anew (other weights)"
    small = autoprune.load(tmp_path / "small", factory=mixed)
    held = {tuple(row.flatten().tolist()) for row in next(other.parameters())}
    assert {tuple(row.flatten().tolist()) for row in next(small.parameters())} <= held


@SLICED
def test_zeros_that_a_model_brings_are_counted_in_its_bytes_and_shown(tmp_path: Path) -> None:
    at = load_front(GOLDEN)[0].id
    facts = apply_file(GOLDEN, f"{__name__}:half_zero", at, tmp_path / "small", Order(criterion="l1_norm"))
    sizes = [(tmp_path / "small" / name).stat().st_size for name in ("model.safetensors", "masks.safetensors")]
    assert facts["bytes"]["pruned"] == sum(sizes)
    assert [Path(path).name for path in facts["files"]].count("masks.safetensors") == 1
    assert set(facts["zeros"]["layers"]) == {"hidden.weight"}
    card = (tmp_path / "small" / "README.md").read_text()
    assert "By weight: hidden.weight 0.5" in card
    assert "- `masks.safetensors`: where the values of masked weights stand" in card
    small = autoprune.load(tmp_path / "small", factory=mixed)
    assert facts["zeros"]["nonzeros"] == int(small.get_parameter("hidden.weight").count_nonzero())


def half_zero() -> nn.Module:
    model = mixed()
    with torch.no_grad():
        model.get_parameter("hidden.weight")[:, ::2] *= 0.0
        model.get_parameter("hidden.weight")[::2] = model.get_parameter("hidden.weight")[::2].roll(1, 1)
    return model


def test_a_model_that_is_none_of_the_three_is_told_what_it_may_be() -> None:
    base = load_front(GOLDEN).base
    with pytest.raises(InputError, match=r"no such folder; it is a Hugging Face folder, timm:NAME, or module:factory"):
        source_of_name("resnet50", base)
    with pytest.raises(InputError, match="returned a int, not a torch"):
        source_of_name("builtins:int", base)
    with pytest.raises(InputError, match="cannot import"):
        source_of_name("nowhere:model", base)


def test_inputs_are_drawn_as_the_file_describes_them() -> None:
    model = nn.Sequential(nn.Embedding(7, 4))
    shapes = [
        {"name": "input_ids", "shape": [2, 5], "dtype": "int64"},
        {"name": "attention_mask", "shape": [2, 5], "dtype": "int64"},
        {"name": "token_type_ids", "shape": [2, 5], "dtype": "int64"},
    ]
    (named,) = drawn_inputs(shapes, model)
    assert 0 <= int(named["input_ids"].min()) <= int(named["input_ids"].max()) < 7
    assert bool(named["attention_mask"].all())
    assert not bool(named["token_type_ids"].any())
    (image,) = drawn_inputs([{"shape": [1, 3, 8, 8], "dtype": "float32"}], model)
    assert image.shape == (1, 3, 8, 8)
    assert image.std() > 0.5
    with pytest.raises(InputError, match="which is no tensor"):
        drawn_inputs([{"shape": [1], "dtype": "os"}], model)
    with pytest.raises(InputError, match="does not say what its model is called with"):
        drawn_inputs([], model)


def test_what_cannot_be_timed_or_exported_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = load_front(GOLDEN)[0]

    def untimed(*_: object) -> str:
        return "it does not run for one sample"

    monkeypatch.setattr(delivery, "latency_facts", untimed)
    order = Order(export=("pt2", f"{__name__}:Broken"))
    with (
        pytest.warns(UserWarning, match="only slices"),
        pytest.raises(RunError, match=r"cannot export to .*:Broken: .*no luck; .*small holds all else"),
    ):
        apply_file(GOLDEN, MIXED, point.id, tmp_path / "small", order)
    facts = json.loads((tmp_path / "small" / "apply.json").read_text())
    assert (facts["latency"], facts["untimed"]) == (None, "it does not run for one sample")
    assert "request" not in facts, "the same command tries again"
    assert {Path(f).name for f in facts["files"]} == {p.name for p in (tmp_path / "small").iterdir()}
    assert (tmp_path / "small" / "model.pt2").exists()
    assert "**Not written**: cannot export" in (tmp_path / "small" / "README.md").read_text()


class Broken:
    suffix = "broken"

    def __call__(self, model: nn.Module, inputs: object, path: Path) -> None:
        raise ValueError("no luck")


@SLICED
def test_a_points_id_from_a_file_is_no_path(tmp_path: Path) -> None:
    data = json.loads(GOLDEN.read_text())
    data["points"][0]["id"] = str(tmp_path / "escaped")
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="which names no folder"):
        apply_file(tmp_path / "policy.json", MIXED, ["knee", data["points"][0]["id"]], tmp_path / "out")
    assert not (tmp_path / "escaped").exists()


@SLICED
def test_several_points_want_a_folder_for_themselves_and_say_so_first(tmp_path: Path) -> None:
    point = load_front(GOLDEN)[0]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; choose a folder"):
        apply_file(GOLDEN, MIXED, [point.id, "knee"], tmp_path / "file")
    apply_file(GOLDEN, MIXED, point.id, tmp_path / "small")
    with pytest.raises(InputError, match=r"holds 'apply.json', and several points want a folder for themselves"):
        apply_file(GOLDEN, MIXED, [point.id, "knee"], tmp_path / "small")
    twice = apply_file(GOLDEN, MIXED, [point.id, point.id], tmp_path / "both")
    assert list(twice["points"]) == [point.id]
    assert (tmp_path / "both" / point.id / "model.safetensors").exists()


@SLICED
def test_a_command_whose_files_have_changed_is_another_one(tmp_path: Path) -> None:
    at = load_front(GOLDEN)[0].id
    path = tmp_path / "w.safetensors"
    save_file(mixed().state_dict(), path)
    order = Order(weights=path)
    first = apply_file(GOLDEN, MIXED, at, tmp_path / "small", order)
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in mixed().state_dict().items()}, path)
    with pytest.raises(InputError, match="has other weights than the policy was found on"):
        apply_file(GOLDEN, MIXED, at, tmp_path / "small", order)
    assert json.loads((tmp_path / "small" / "apply.json").read_text()) == first


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.application.test_delivery:fails", r"--model .*:fails fails: ZeroDivisionError"),
        ("tests.application.test_delivery:Half", "returned a Half without"),
    ],
)
def test_a_factory_that_fails_or_makes_half_a_task_is_one_line(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        source_of_name(name, load_front(GOLDEN).base)


def fails() -> nn.Module:
    raise ZeroDivisionError


class Half:
    def build(self) -> nn.Module:
        return mixed()
