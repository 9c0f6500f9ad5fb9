"""bfloat16: chosen by capability and size, exact for the dense policy, close to float32, refused where it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from autoprune.evaluation import Ask
from autoprune.evaluator.precision import SMALL_MACS, choose_precision, computing, has_bfloat16, widened
from autoprune.policy import Policy
from tests.evaluator.test_tiers import evaluator, narrow
from tests.small import world, world_of

CPU = torch.device("cpu")


def test_auto_is_a_matter_of_hardware_and_size_and_a_wish_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("bf16", CPU, 1.0) == "bf16"
    assert choose_precision("fp32", CPU, 1e12) == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert [choose_precision("auto", CPU, m) for m in (SMALL_MACS - 1, SMALL_MACS)] == ["fp32", "bf16"]
    assert not has_bfloat16(torch.device("mps"))
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert choose_precision("auto", CPU, 1e12) == "fp32"


@pytest.mark.parametrize("family", ["projection", "mobilenet", "plain", "unet"])
@pytest.mark.parametrize("tier", ["stitch", "refit"])
def test_in_bfloat16_the_dense_policy_scores_exactly_zero_on_every_split(family: str, tier: str) -> None:
    w = world(family)
    evaluate = evaluator(w, precision="bf16")
    assert evaluate.precision == "bf16"
    for split in ("fitness", "heldback", "validation"):
        assert abs(evaluate(Ask(Policy.dense(w.structure), tier, split=split)).loss) <= 1e-7  # type: ignore[arg-type]
    for (name, a), b in zip(evaluate.stitcher.model.state_dict().items(), w.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("tier", ["stitch", "refit", "tune"])
@pytest.mark.parametrize("family", ["projection", "plain", "unet"])
def test_losses_in_bfloat16_are_close_to_those_in_float32(family: str, tier: str) -> None:
    w = world(family)
    exact, rounded = evaluator(w, precision="fp32"), evaluator(w, precision="bf16")
    for share in (0.4, 0.7):
        a, b = (e(Ask(narrow(w, share), tier)) for e in (exact, rounded))  # type: ignore[arg-type]
        assert b.loss == pytest.approx(a.loss, rel=0.05)
        assert a.loss != b.loss
        assert a.passes == b.passes
    assert all(p.dtype == torch.float32 for p in rounded.stitcher.model.parameters())
    assert not rounded.stitcher.model._forward_hooks


def test_validation_is_scored_in_float32_after_a_repair_in_bfloat16() -> None:
    w = world("projection")
    evaluate = evaluator(w, precision="bf16")
    e = evaluate(Ask(narrow(w), "refit", split="validation"))
    with torch.no_grad():
        pairs = [(evaluate.stitcher.model(b[0]), w.model(b[0])) for b in evaluate.batches("validation")]
    losses = [evaluate.measure(p, d).mean() for p, d in pairs]
    rounding = 1e-8  # of float32 logits that hardly differ: 5e-9 on another CPU
    assert e.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5, abs=rounding)


class Drowned(nn.Module):
    """Logits that bfloat16 loses in a large constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.outer(self.inner(x).relu()) + 1e3) - 1e3


def test_a_model_that_does_not_bear_bfloat16_is_evaluated_in_float32_with_a_warning() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        w = world_of(Drowned().eval(), (6,), 64)
    with pytest.warns(UserWarning, match="in bfloat16 the dense model's outputs are off by"):
        evaluate = evaluator(w, precision="bf16")
    assert evaluate.precision == "fp32"
    assert evaluate.precision_error > 1e-3
    ask = Ask(narrow(w), "refit")
    assert evaluate(ask).loss == evaluator(w, precision="fp32")(ask).loss


def test_only_the_forward_computes_in_bfloat16_also_where_it_fails() -> None:
    class Fussy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.seen = nn.Linear(4, 4), torch.float32

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.fc(x)
            self.seen = y.dtype
            if len(x) > 2:
                raise ValueError("too many")
            return {"logits": y}

    model, x = Fussy(), torch.randn(2, 4)
    with torch.no_grad(), computing(model, "bf16"):
        assert model(x)["logits"].dtype == torch.float32
        assert model.seen == torch.bfloat16
        with pytest.raises(ValueError, match="too many"), warnings.catch_warnings():
            model(torch.randn(3, 4))
        assert not torch.is_autocast_enabled("cpu")
        assert (x @ x.T).dtype == torch.float32
    assert model(x)["logits"].dtype == torch.float32
    assert model.seen == torch.float32
    assert widened(x.double()).dtype == torch.float64
