"""A fit that is killed goes on with what it had measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune.latency import probes
from autoprune.latency.kept import Kept
from autoprune.latency.timing import Timing
from autoprune.latency.whole_models import Clocked, fitting_latency
from autoprune.protocols import finished
from autoprune.space import Space, restrict
from autoprune.structure import Structure
from autoprune.tracing.analyze import analyze

INPUTS = (torch.zeros(2, 3, 8, 8),)
ASKED = Clocked("eager", 1, 20)


def small() -> tuple[nn.Module, Structure]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    return model, restrict(analyze(model, INPUTS), Space())


def test_nothing_that_was_measured_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.latency.kept.EVERY_S", -1.0)
    path, loaded, load = tmp_path / "latency.parts", [0], probes.load_operation

    def counted(*given: object) -> object:
        loaded[0] += 1
        return load(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(probes, "load_operation", counted)
    model, structure = small()
    steps = fitting_latency(model, INPUTS, structure, ASKED, path, seconds=0.01)
    operations = [step for _, step in zip(range(6), steps, strict=False)]
    steps.close()  # as a kill would
    total = int(operations[0].total)
    assert (len(Kept(path).operations), loaded[0]) == (5, 5)
    table = finished(fitting_latency(model, INPUTS, structure, ASKED, path, seconds=0.01))
    assert loaded[0] == total
    assert 10 < table.n_models <= 20
    assert not path.exists()


def test_models_are_kept_at_once_and_garbage_is_nothing(tmp_path: Path) -> None:
    path, timing = tmp_path / "x.parts", Timing(0.5, 0.1, 7, 1.0)
    kept = Kept(path)
    kept.more_models([timing, timing])
    assert Kept(path).models == [timing, timing]
    path.write_text("garbage")
    assert (Kept(path).models, Kept(path).operations) == ([], {})
