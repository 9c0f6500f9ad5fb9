"""Weights files that do not fit are refused in one line that names the tensors and guesses why."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.tasks._weights import filled, load_weights, read_checkpoint

State = dict[str, Tensor]


def net(classes: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, classes))


def with_nan(state: State) -> State:
    state["2.weight"][0, 0, 0, 0] = float("nan")
    return state


def narrower(state: State) -> State:
    state["0.weight"], state["2.weight"] = state["0.weight"][:5], state["2.weight"][:, :5]
    return {k: v[:5] if k.startswith(("0.bias", "1.")) and v.dim() else v for k, v in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {f"module.{k}": v for k, v in s.items()},
            r"begin with 'module.', as DataParallel and DDP save them",
        ),
        (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, r"begin with '_orig_mod.', as torch.compile saves"),
        (lambda s: {f"model.{k}": v for k, v in s.items()}, r"begin with 'model.', as Lightning saves them"),
        (lambda s: {f"net.backbone.{k}": v for k, v in s.items()}, r"begin with 'net.backbone.', strip it"),
        (
            lambda s: {k: v for k, v in s.items() if k[0] != "4"},
            r"no tensor '4.weight', '4.bias', which the model needs",
        ),
        (lambda s: {**s, "ema.decay": torch.zeros(1)}, r"holds 'ema.decay', which the model does not have"),
        (
            lambda s: {**s, "4.weight": torch.zeros(7, 6), "4.bias": torch.zeros(7)},
            r"4.weight is \[7, 6\], the model has \[5, 6\]; 4.bias .*another number of classes\?",
        ),
        (narrower, r"0.weight is \[5, 3, 3, 3\], the model has \[8, 3, 3, 3\]; .* and 4 more .*a pruned model\?"),
        (with_nan, r"2.weight holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_say_which_and_why(
    change: Callable[[State], State], message: str, tmp_path: Path
) -> None:
    state = change({k: v.clone() for k, v in net().state_dict().items()})
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load_weights(net(), tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_half_precision_is_converted(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in net().state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    model = net()
    load_weights(model, tmp_path / "half.safetensors")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, state["0.weight"].float())


@pytest.mark.parametrize("old", [True, False])
def test_a_checkpoint_of_torch_is_told_from_a_damaged_file(old: bool, tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "plain.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(InputError, match=r"a checkpoint of torch.save, not a safetensors file"):
        load_weights(net(), tmp_path / "plain.pth")


def same(found: Any, state: State) -> bool:
    return set(found) == set(state) and all(torch.equal(found[k], state[k]) for k in state)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {"model": net().state_dict(), "model_ema": {"n_averaged": torch.tensor(9), **s}},
        lambda s: {"state_dict": net().state_dict(), "state_dict_ema": s},
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_is_read_without_what_training_scripts_put_around_it(
    wrapped: Callable[[State], Any], old: bool, tmp_path: Path
) -> None:
    state = net().state_dict()
    torch.save(wrapped(state), tmp_path / "c.pth", _use_new_zipfile_serialization=not old)
    assert same(read_checkpoint(tmp_path / "c.pth"), state)


def test_a_safetensors_file_is_read_as_a_checkpoint_whatever_its_name(tmp_path: Path) -> None:
    state = net().state_dict()
    save_file({f"_orig_mod.{k}": v for k, v in state.items()}, tmp_path / "c.bin")
    assert same(read_checkpoint(tmp_path / "c.bin"), state)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (net(), r"c.pth is damaged or holds more than weights \(UnpicklingError: .*save model.state_dict\(\) alone"),
        ({"epoch": 3}, r"c.pth holds no weights, at its top or under state_dict_ema, model_ema, state_dict, model"),
        ([torch.zeros(2)], r"c.pth holds no weights"),
    ],
)
def test_a_checkpoint_that_holds_other_things_is_refused_unread(held: Any, message: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "c.pth")
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(tmp_path / "c.pth")
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_cut_short_or_missing_is_refused(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"c.pth is damaged or holds more than weights"):
        read_checkpoint(tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"no weights file .*none.pth"):
        read_checkpoint(tmp_path / "none.pth")


def test_a_checkpoint_decides_how_many_outputs_a_model_gets(tmp_path: Path) -> None:
    def build(num_classes: int = 5) -> nn.Module:
        return net(num_classes)

    torch.save(net(7).state_dict(), tmp_path / "seven.pth")
    before = torch.random.get_rng_state()
    model = filled(build, lambda _: "4.weight", tmp_path / "seven.pth")
    assert torch.equal(before, torch.random.get_rng_state())
    assert same(model.state_dict(), torch.load(tmp_path / "seven.pth"))
    torch.save({"head": torch.zeros(7, 6)}, tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=r"has no tensor '0.weight', .* and 7 more, which the model needs, and has 'head'"
    ):
        filled(build, lambda _: "4.weight", tmp_path / "other.pth")
