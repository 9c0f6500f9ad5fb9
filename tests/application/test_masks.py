"""Masked weights on disk: bits and values, read back bit for bit, refused where the two do not belong together."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoprune
from autoprune.application.masks import MASKS, split
from autoprune.application.plain import RECIPE, recipe
from autoprune.errors import InputError
from autoprune.files.policy_file import load_front, save_front
from autoprune.front import Front
from autoprune.matrices import with_weights
from autoprune.policy import Policy
from autoprune.space import Space
from autoprune.structure import Structure
from autoprune.tracing.masks import packed, unpacked
from autoprune.tracing.rounding import nearest, round_weights
from tests.application.test_stored import Net, front_of, policy_of
from tests.points import front_over
from tests.small import World, world_of

DENSITY = 0.3


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def w() -> World:
    return world_of(net(), (3, 8, 8))


def masked_model(w: World, keep: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A model that was cut by channels, with zeros in two of the weights that are left."""
    front = front_of(w, policy_of(w, stem=12))
    with pytest.warns(UserWarning, match="only slices"):
        made = autoprune.apply(front[0], w.model, w.task.example_inputs())
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (made.wide.weight, made.head.weight):
            mask = torch.rand(weight.shape, generator=draw) < DENSITY if keep is None else keep(weight)
            weight.mul_(mask)
    return made


@pytest.fixture(scope="module")
def made(w: World) -> nn.Module:
    return masked_model(w)


@pytest.fixture
def saved(made: nn.Module, tmp_path: Path) -> Path:
    autoprune.save(made, tmp_path / "small")
    return tmp_path / "small"


def alike(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_bits_stand_row_by_row_the_first_one_highest() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[1, 4] = True
    assert packed(mask).tolist() == [0b10000000, 0b01000000]
    assert torch.equal(unpacked(packed(mask), (2, 5)), mask)


def test_a_masked_model_is_read_back_bit_for_bit_and_lies_there_without_its_zeros(
    w: World, made: nn.Module, saved: Path
) -> None:
    assert {p.name for p in saved.iterdir()} == {MASKS, "README.md", "apply.json", "model.safetensors", "policy.json"}
    held, masks = load_file(saved / "model.safetensors"), load_file(saved / MASKS)
    assert sorted(masks) == ["head.weight", "wide.weight"]
    for name, bits in masks.items():
        weight = made.get_parameter(name).detach()
        assert torch.equal(held[name], weight[weight != 0])
        assert bits.nbytes == -(-weight.numel() // 8)
    again = autoprune.load(saved, factory=net)
    assert alike(again, made)
    assert alike(autoprune.load_applied(saved, w.model, w.task.example_inputs()), made)
    autoprune.save(again, saved)
    assert alike(autoprune.load(saved, factory=net), made)


def test_bytes_on_disk_are_those_of_the_cost(made: nn.Module, saved: Path) -> None:
    cost = 0
    for name, tensor in made.state_dict().items():
        least = tensor.count_nonzero() * tensor.element_size() + tensor.numel() / 8
        cost += int(least) if name in ("wide.weight", "head.weight") else tensor.nbytes
    disk = sum((saved / name).stat().st_size for name in (MASKS, "model.safetensors"))
    assert cost < disk < cost + 2500  # names and shapes
    assert json.loads((saved / "apply.json").read_text())["files"][:2] == ["model.safetensors", MASKS]


def test_a_model_without_zeros_is_written_as_ever(w: World, tmp_path: Path) -> None:
    model = masked_model(w, torch.ones_like)
    autoprune.save(model, tmp_path / "small")
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "small" / "model.safetensors").read_bytes()
    assert not (tmp_path / "small" / MASKS).exists()
    assert "zeros" not in json.loads((tmp_path / "small" / "apply.json").read_text())
    card = (tmp_path / "small" / "README.md").read_text()
    assert RECIPE in card
    assert "Zeros" not in card


def test_masks_go_when_the_zeros_are_trained_away(made: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(made)
    autoprune.save(model, tmp_path / "small")
    with torch.no_grad():
        for weight in (model.wide.weight, model.head.weight):
            weight.add_(1.0)
    autoprune.save(model, tmp_path / "small")
    assert not (tmp_path / "small" / MASKS).exists()
    assert alike(autoprune.load(tmp_path / "small", factory=net), model)


def test_zeros_and_8_bits_are_integers_of_what_is_left(tmp_path: Path) -> None:
    w = world_of(net(), (3, 8, 8), space=Space(bits=(32, 8)))
    policy = policy_of(w, **{"wide.weight@bits": 8, "head.weight@bits": 8})
    with pytest.warns(UserWarning, match="only slices"):
        model = autoprune.apply(front_of(w, policy)[0], w.model, w.task.example_inputs())
    with torch.no_grad():
        model.wide.weight.mul_(torch.rand(model.wide.weight.shape) < DENSITY)
    round_weights(model, w.structure, policy.as_dict())
    autoprune.save(model, tmp_path / "small")
    held = load_file(tmp_path / "small" / "model.safetensors")
    kept = int(model.wide.weight.count_nonzero())
    assert (held["wide.weight"].dtype, held["wide.weight"].shape) == (torch.int8, (kept,))
    assert held["head.weight"].shape == model.head.weight.shape
    assert alike(autoprune.load(tmp_path / "small", factory=net), model)
    own: dict[str, object] = {}
    exec(recipe(True), own)
    assert alike(own["pruned"](net(), str(tmp_path / "small")), model)  # type: ignore[operator]


def test_zeros_that_rounding_makes_and_dead_channels_are_no_mask(tmp_path: Path) -> None:
    w = world_of(net(), (3, 8, 8), space=Space(bits=(32, 8)))
    with torch.no_grad():
        w.model.wide.weight.copy_(0.05 * torch.randn(w.model.wide.weight.shape))
        w.model.wide.weight[:, 0, 0, 0] = 3.0  # one large number a row, and a fifth of the others become zero
        w.model.stem.weight[:9] = 0.0
    policy = policy_of(w, **{"wide.weight@bits": 8})
    with pytest.warns(UserWarning, match="only slices"):
        model = autoprune.apply(front_of(w, policy)[0], w.model, w.task.example_inputs())
    assert float((nearest(model.wide.weight.detach()).integers == 0).float().mean()) > 0.15
    autoprune.save(model, tmp_path / "small")
    assert not (tmp_path / "small" / MASKS).exists()


def test_where_the_policy_wants_zeros_a_weight_of_dead_columns_is_masked_too(w: World) -> None:
    structure = with_weights(Structure((), w.structure.ops))
    model, widths = net(), Policy.dense(structure).as_dict()
    group = structure.group("wide.weight")
    front = front_over(model, w.task.example_inputs(), structure=structure)
    policy = Policy.of(widths | {group.name: group.grid[6]})
    with torch.no_grad():
        model.wide.weight[:, 2:] = 0.0
    names, point = [name for name, _ in model.named_parameters()], replace(front[0], policy=policy)
    found = split(model.state_dict(), names, point)
    assert list(found.shapes) == ["wide.weight"]
    assert found.tensors["wide.weight"].shape == (40 * 2 * 9,)
    assert not split(model.state_dict(), names, replace(point, policy=Policy.of(widths))).bits


PLAIN = """
import sys
sys.modules["autoprune"] = None  # whoever imports it fails
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.wide = nn.Conv2d(24, 40, 3, padding=1)
        self.head = nn.Linear(40, 16)

    def forward(self, x):
        return self.head(self.wide(self.bn(self.stem(x)).relu()).relu().mean((2, 3)))

build = Net
"""


def test_the_recipe_of_the_card_builds_it_where_there_is_no_autoprune(made: nn.Module, saved: Path) -> None:
    card = (saved / "README.md").read_text()
    (code,) = [part.partition("\n```")[0] for part in card.split("```python\n") if "def unmasked" in part]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    save_file({"x": x}, saved.parent / "x")
    ends = 'torch.manual_seed(5); x = load_file("x")["x"]\nfrom safetensors.torch import save_file\n'
    ends += 'save_file({"y": model(x).detach(), **{k: v.contiguous() for k, v in model.state_dict().items()}}, "y")\n'
    program = PLAIN + code.replace('"FOLDER"', '"small"') + "\n" + ends
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=saved.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(saved.parent / "y")
    torch.testing.assert_close(found.pop("y"), made(x).detach())
    assert all(torch.equal(found[name], tensor) for name, tensor in made.state_dict().items())


def test_apply_json_and_the_card_say_what_the_zeros_are(made: nn.Module, saved: Path) -> None:
    told = json.loads((saved / "apply.json").read_text())["zeros"]
    weights = {n: made.get_parameter(n).detach() for n in ("wide.weight", "head.weight")}
    assert {n: layer["nonzeros"] for n, layer in told["layers"].items()} == {
        name: int(weight.count_nonzero()) for name, weight in weights.items()
    }
    assert told["density"] == pytest.approx(DENSITY, abs=0.05)
    assert told["bytes"]["dense"]["plain"] == sum(weight.nbytes for weight in weights.values())
    card = (saved / "README.md").read_text()
    assert f"{told['nonzeros']:,} of the {told['weights']:,} numbers in masked weights" in card
    assert f"| bits and values, as in this folder | {told['bytes']['mask']['plain']:,} |" in card


def test_a_pattern_is_told_where_it_is_held(w: World, tmp_path: Path) -> None:
    def two_of_four(weight: Tensor) -> Tensor:
        runs = weight.detach().abs().movedim(1, -1)
        runs = runs.unflatten(-1, (-1, 4))
        mask = torch.zeros_like(runs).scatter_(-1, runs.topk(2, -1).indices, 1.0)
        return mask.flatten(-2).movedim(-1, 1)

    model = masked_model(w, two_of_four)
    autoprune.save(model, tmp_path / "small")
    told = json.loads((tmp_path / "small" / "apply.json").read_text())["zeros"]
    assert {layer.get("pattern") for layer in told["layers"].values()} == {"2:4"}
    assert (
        "At most 2 of every 4 inputs that lie side by side are not zero: all of them."
        in (tmp_path / "small" / "README.md").read_text()
    )


def rewritten(folder: Path, change: Callable[[dict[str, Tensor], dict[str, object]], None]) -> None:
    """masks.safetensors with its tensors and metadata changed."""
    tensors = load_file(folder / MASKS)
    with safe_open(folder / MASKS, "pt") as file:
        told = json.loads(file.metadata()["masks"])
    change(tensors, told)
    save_file(tensors, folder / MASKS, {"masks": json.dumps(told)})


def _shape(tensors: dict[str, Tensor], told: dict[str, object]) -> None:
    told["shapes"]["head.weight"] = [16, 41]  # type: ignore[index]


def _turned(tensors: dict[str, Tensor], told: dict[str, object]) -> None:
    told["shapes"]["head.weight"] = [40, 16]  # type: ignore[index]


def _ones(tensors: dict[str, Tensor], told: dict[str, object]) -> None:
    tensors["head.weight"][0] = ~tensors["head.weight"][0]
    tensors["head.weight"][1] = 255


def _moved(tensors: dict[str, Tensor], told: dict[str, object]) -> None:
    tensors["head.weight"] = tensors["head.weight"].flip(0).contiguous()


def _renamed(tensors: dict[str, Tensor], told: dict[str, object]) -> None:
    tensors["other.weight"] = tensors.pop("head.weight")
    told["shapes"]["other.weight"] = told["shapes"].pop("head.weight")  # type: ignore[index,attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shape, r"the mask of head.weight is uint8 \[80\], and its shape \[16, 41\] takes uint8 \[82\]"),
        (_ones, r"the mask of head.weight has \d+ ones, and model.safetensors has \[\d+\] values for it"),
        (_moved, "belongs to other weights: model.safetensors was written with other masks"),
        (_turned, "belongs to other weights: model.safetensors was written with other masks"),
        (_renamed, "has a mask of other.weight, and model.safetensors has no such weight"),
        (lambda tensors, told: told.update(policy="sha256:0"), "belongs to another policy than point p00"),
        (lambda tensors, told: told.update(format="autoprune/masks/2"), "has the format 'autoprune/masks/2'"),
        (lambda tensors, told: told.pop("shapes"), "is no file of masks"),
        (lambda tensors, told: tensors.pop("head.weight"), "is damaged: it has masks and shapes of different weights"),
    ],
)
def test_masks_that_do_not_belong_there_are_one_line(
    change: Callable[[dict[str, Tensor], dict[str, object]], None], message: str, saved: Path
) -> None:
    rewritten(saved, change)
    with pytest.raises(InputError, match=message) as caught:
        autoprune.load(saved, factory=net)
    assert "\n" not in str(caught.value)
    assert MASKS in str(caught.value)


def test_a_missing_a_damaged_and_a_left_over_file_are_one_line(saved: Path, tmp_path: Path, w: World) -> None:
    whole = (saved / MASKS).read_bytes()
    (saved / MASKS).unlink()
    with pytest.raises(InputError, match=r"no .*masks.safetensors: model.safetensors holds values without zeros"):
        autoprune.load(saved, factory=net)
    (saved / MASKS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"masks.safetensors is not a whole safetensors file"):
        autoprune.load(saved, factory=net)
    autoprune.save(masked_model(w, torch.ones_like), tmp_path / "dense")
    (tmp_path / "dense" / MASKS).write_bytes(whole)
    with pytest.raises(InputError, match=r"masks.safetensors belongs to other weights: .* has none that are masked"):
        autoprune.load(tmp_path / "dense", factory=net)


def test_masks_of_the_same_widths_from_another_search_are_refused(w: World, saved: Path, tmp_path: Path) -> None:
    front = load_front(saved / "policy.json")
    other = replace(front[0], policy=Policy.of(front[0].policy.as_dict() | {"stem": w.structure.group("stem").width}))
    other = replace(other, keep={**other.keep, "stem": tuple(range(w.structure.group("stem").width))})
    shutil.copytree(saved, tmp_path / "other")
    save_front(Front((other,), front.base, {}, {}), tmp_path / "other" / "policy.json")
    with pytest.raises(InputError, match="belongs to another policy"):
        autoprune.load(tmp_path / "other", factory=net)
