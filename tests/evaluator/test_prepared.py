"""The format that a model is put into is tried once: afterwards its weights tell it."""

from __future__ import annotations

import pytest
import torch

from autoprune.evaluator import prepared
from autoprune.evaluator.prepared import fast_format, layout_of, prepared_model
from tests.families import FAMILIES
from tests.small import RandomTask

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["plain", "projection", "mobilenet", "unet"])
def test_a_prepared_models_weights_tell_the_format_that_was_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    task = RandomTask(family.build().eval(), family.shape)
    model = prepared_model(task, CPU)
    tried = fast_format(task, model)
    monkeypatch.setattr(prepared, "fast_format", None)  # not again
    assert layout_of(task, model) == tried


def test_a_model_whose_weights_are_the_same_in_both_formats_is_tried() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), torch.nn.Linear(4 * 64, 2))
    task = RandomTask(model.eval(), (3, 8, 8))
    assert layout_of(task, prepared_model(task, CPU)) == fast_format(task, task.build())
