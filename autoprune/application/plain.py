"""How a pruned model is built again without autoprune: what of its modules differs from the dense model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from autoprune.tracing.stand_ins import StandIn

RECIPE = '''\
import json
import torch
from safetensors.torch import load_file

class StandIn(torch.nn.Module):  # where a block was left out: zeros like its input, or the input as it is
    def __init__(self, gives, results):
        super().__init__()
        self.gives, self.results = gives, results

    def forward(self, *args, **kwargs):
        given = [kwargs.get("hidden_states"), *args, *kwargs.values()]
        x = next(t for t in given if isinstance(t, torch.Tensor))
        first = torch.zeros_like(x) if self.gives == "zero" else x.clone()
        return (first, *[None] * (self.results - 1)) if self.results else first

def pruned(dense, folder):
    """`dense`, the model that was pruned (its weights do not matter), made into the pruned one."""
    with open(f"{folder}/apply.json") as file:
        told = json.load(file)["rebuild"]
    for path, (gives, results) in told["absent"].items():
        parent, _, name = path.rpartition(".")
        dense.get_submodule(parent)._modules[name] = StandIn(gives, results)
    tensors = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    stored = load_file(f"{folder}/model.safetensors")
    for name, value in stored.items():
        if name in tensors:  # a tensor that two modules share is there once; 8-bit integers have scales
            tensors[name].data = value * stored[f"{name}.scales"] if f"{name}.scales" in stored else value
    for path, value in told["attributes"].items():
        module, _, name = path.rpartition(".")
        setattr(dense.get_submodule(module), name, tuple(value) if isinstance(value, list) else value)
    return dense.eval()
'''
"""Plain PyTorch that does what `autoprune.load` does, from apply.json's `rebuild`."""
UNMASKED = '''\
def unmasked(folder):
    """The tensors of the folder; masked weights lie there as values, and as bits that say where these stand."""
    stored = load_file(f"{folder}/model.safetensors")
    with safe_open(f"{folder}/masks.safetensors", "pt") as file:
        for name, shape in json.loads(file.metadata()["masks"])["shapes"].items():
            bits = numpy.unpackbits(file.get_tensor(name).numpy(), count=math.prod(shape))
            whole = torch.zeros(len(bits), dtype=stored[name].dtype)
            whole[torch.from_numpy(bits).bool()] = stored[name]
            stored[name] = whole.view(shape)
    return stored

'''


def recipe(with_masks: bool) -> str:
    """`RECIPE`, or the one that puts the values of masked weights back to their places first."""
    if not with_masks:
        return RECIPE
    read, found = 'load_file(f"{folder}/model.safetensors")', RECIPE
    for old, new in (
        ("import json\n", "import json\nimport math\nimport numpy\n"),
        ("import load_file\n", "import load_file\nfrom safetensors import safe_open\n"),
        (read, "unmasked(folder)"),
        ("def pruned(", f"{UNMASKED}def pruned("),
    ):
        assert old in found
        found = found.replace(old, new)
    return found


def rebuild_facts(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """What apply.json keeps for `RECIPE`: attributes with their new values, and the modules of absent blocks.

    `own` names modules whose class is another one now, which only autoprune builds.
    """
    before = dict(dense.named_modules(remove_duplicate=False))
    found: dict[str, Any] = {"attributes": {}, "absent": {}, "own": []}
    for path, module in small.named_modules(remove_duplicate=False):
        if isinstance(module, StandIn):
            found["absent"][path] = [module.gives, module.results]
        elif path not in before or type(module) is not type(before[path]):
            found["own"].append(path)
        else:
            found["attributes"] |= {f"{path}.{name}" if path else name: v for name, v in _changed(before[path], module)}
    return found


def _changed(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any]]:
    """Plain numbers, and lists of them, that a module holds and that are other ones now."""
    held: Mapping[str, Any] = vars(before)
    for name, value in vars(after).items():
        plain = _is_number(value) or (type(value) in (list, tuple) and all(_is_number(v) for v in value))
        if plain and name in held and held[name] != value:
            yield name, list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
