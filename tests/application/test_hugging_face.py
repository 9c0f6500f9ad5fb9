"""Applied models of transformers load from their folder alone, and answer as they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.application.delivery import apply_file
from autoprune.errors import InputError
from autoprune.files.policy_file import save_front
from autoprune.tracing.copies import flat_output
from autoprune.tracing.inputs import call_model
from tests.points import front_over
from tests.text_folders import write_model
from tests.transformer_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:without a task autoprune.apply only slices")
OF_A_CLASS = [name for name, small in MODELS.items() if small.config and not small.model.startswith(("T5", "Whisper"))]


def output(model: nn.Module, inputs: object) -> Tensor:
    with torch.no_grad():
        return flat_output(call_model(model, inputs))


@pytest.mark.parametrize("name", OF_A_CLASS)
def test_a_model_of_each_family_is_saved_and_loads_without_a_factory(name: str, tmp_path: Path) -> None:
    dense, inputs = MODELS[name].build(), MODELS[name].example()
    (point,) = front_over(dense, inputs)
    small = autoprune.apply(point, dense, inputs)
    autoprune.save(small, tmp_path / "small")
    again = autoprune.load(tmp_path / "small")
    assert type(again) is type(dense)
    assert torch.equal(output(again, inputs), output(small, inputs))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_folder_of_hugging_face_is_applied_to_by_its_name_and_the_result_stands_alone(
    name: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "dense", name)
    library = pytest.importorskip("transformers")
    dense = getattr(library, "BertModel" if name == "bert" else "LlamaForCausalLM").from_pretrained(folder).eval()
    ids = torch.arange(4, 12).view(2, 4)
    inputs = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)},)
    save_front(front_over(dense, inputs), tmp_path / "policy.json")
    facts = apply_file(tmp_path / "policy.json", str(folder), "p00", tmp_path / "small")
    assert facts["atoms"] == "replayed"
    assert {"config.json", "tokenizer.json"} <= {Path(file).name for file in facts["files"]}
    for path in sorted(folder.iterdir()):
        path.unlink()
    small = autoprune.load(tmp_path / "small")
    with torch.no_grad():
        found, wanted = small(**inputs[0])[0], dense(**inputs[0])[0]
    assert found.shape == wanted.shape
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())


def test_a_config_that_names_no_class_of_transformers_is_one_line(tmp_path: Path) -> None:
    dense, inputs = MODELS["bert"].build(), MODELS["bert"].example()
    (point,) = front_over(dense, inputs)
    autoprune.save(autoprune.apply(point, dense, inputs), tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "autoprune": {**told["autoprune"], "class": "os.system"}}))
    with pytest.raises(InputError, match=r"names the class 'os.system', which transformers does not have"):
        autoprune.load(tmp_path / "small")
    path.write_text(json.dumps({**told, "attn_implementation": "org/kernel", "auto_map": {"AutoModel": "x.Y"}}))
    assert autoprune.load(tmp_path / "small").config._attn_implementation in ("sdpa", "eager")
    path.write_text(json.dumps({**told, "hidden_size": "wide"}))
    with pytest.raises(InputError, match="transformers cannot build BertModel from it"):
        autoprune.load(tmp_path / "small")
    path.write_text("{")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        autoprune.load(tmp_path / "small")
