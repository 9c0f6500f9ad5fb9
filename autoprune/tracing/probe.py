"""Which channels go together, by labels sent along the model's own operations: where torch-pruning's graph is wrong.

One forward pass under a dispatch mode. What moves values about (views, slices, concatenation, padding, shuffles) moves
their labels by the very same call; what works element by element makes those that lie over each other go together;
what mixes values along a dimension (sums, norms, softmax) makes all along it go together. Like every closure this is
a hypothesis: certification decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.tracing.copies import quiet_random_state
from autoprune.tracing.counted import Marked, counted, tie_counted
from autoprune.tracing.couple import Closure
from autoprune.tracing.inputs import call_model
from autoprune.tracing.label_rules import contract, follow
from autoprune.tracing.labelled import Call, Labelled
from autoprune.tracing.labels import Key
from autoprune.tracing.watch import is_producer

CONVOLUTIONS = frozenset({"convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable"})
TURNS = frozenset({"t", "transpose", "permute", "detach", "alias", "view", "_unsafe_view"})


def probed(model: nn.Module, inputs: Sequence[Any]) -> tuple[tuple[Closure, ...], ...]:
    """One closure for every side of a layer that channels meet; `model` is a private copy and is left as it was.

    Where numbers of its modules count channels there are several such hypotheses: with these, without, and with those
    that count rows of channels.
    """
    probe = Probe(model)
    with quiet_random_state(0), torch.no_grad(), probe:
        call_model(model, inputs)
    ways, places = [probe.known.places.closures()], probe.known.places
    numbers = counted(model, inputs, probe.cuts)
    if tie_counted(probe.known, numbers):
        ways.insert(0, places.closures())
    if tie_counted(probe.known, numbers, merge=True):
        ways.append(places.closures())
    return tuple(ways)


class Probe(TorchDispatchMode):
    """Sees every operation of a forward pass and sends labels along."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = Labelled(model)
        self.cuts: list[Marked] = []
        self._matrices: dict[int, tuple[Tensor, Tensor, bool]] = {}  # views of weights, theirs, whether transposed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call = Call.of(func, args, kwargs or {}, result)
        with torch.no_grad():
            self._follow(call)
        if (marked := Marked.of(call, self.known)) is not None:
            self.cuts.append(marked)
        return result

    def _follow(self, call: Call) -> None:
        if call.name in TURNS:
            self._turn(call)
        if call.name in CONVOLUTIONS:
            self._convolve(call)
        elif call.name in {"mm", "addmm", "linear"}:
            self._multiply(call)
        elif call.name == "embedding":
            self._embed(call)
        else:
            follow(self.known, call)

    def _turn(self, call: Call) -> None:
        """Views of a matrix: a linear multiplies by its weight transposed."""
        source = call.named["self"]
        _, root, turned = self._matrices.get(id(source), (source, source, False))
        if id(root) in self.known.names and root.dim() == 2 and call.outputs and call.outputs[0].dim() == 2:
            view = call.outputs[0]
            turn = view.shape != source.shape or view.stride() != source.stride()
            self._matrices[id(view)] = (view, root, turned != turn)

    def _convolve(self, call: Call) -> None:
        known, out = self.known, call.outputs[0]
        x, weight, groups = (call.named[n] for n in ("input", "weight", "groups"))
        vector, (owner, module) = known.channels(x), known.owner(weight)
        each = out.shape[1] // groups
        turned = each > 1 and bool(call.named.get("transposed"))
        made = None
        if vector is not None and bool(vector.any()) and 1 < groups == x.shape[1] and not turned:
            made = vector.repeat_interleave(each)  # every channel by itself
            known.lay(weight, 0, made)
        elif module is not None and isinstance(module, nn.modules.conv._ConvNd) and is_producer(module):
            if vector is not None:
                known.places.tie(vector, known.places.labels((owner, "in", None), len(vector)))
            made = known.places.labels((owner, "out", None), out.shape[1])
        elif vector is not None:
            known.places.lose(vector, "a weight that is no layer's own")
        if made is not None:
            known.lay(call.named.get("bias"), 0, made)
            known.set(out, made.view([1, -1] + [1] * (out.dim() - 2)).expand(out.shape))

    def _multiply(self, call: Call) -> None:
        """A matrix of activations times one of the model, as a linear layer's; or times other activations."""
        names = ("mat1", "mat2", "self") if call.name == "addmm" else ("self", "mat2", "bias")
        one, two, bias = (call.named.get(n) for n in (("input", "weight", "bias") if call.name == "linear" else names))
        assert isinstance(one, Tensor)
        assert isinstance(two, Tensor)
        _, weight, turned = self._matrices.get(id(two), (two, two, call.name == "linear"))
        if id(weight) not in self.known.names or weight.dim() != 2:
            contract(self.known, call, one, two)
            return
        known, (owner, module), labels = self.known, self.known.owner(weight), self.known.of(one)
        layer = turned and isinstance(module, nn.Linear) and module.weight is weight
        if labels is not None:
            vector = known.places.merge(labels, range(labels.dim() - 1)).reshape(-1).expand(one.shape[-1])
            side: Key = (owner, "in", None) if layer else (known.names[id(weight)], "in", int(turned))
            known.places.tie(vector, known.places.labels(side, len(vector)))
        if layer:
            made = known.places.labels((owner, "out", None), call.outputs[0].shape[-1])
            known.lay(bias, 0, made)
            known.set(call.outputs[0], made.expand(call.outputs[0].shape))

    def _embed(self, call: Call) -> None:
        owner, module = self.known.owner(call.named["weight"])
        if isinstance(module, nn.Embedding):
            made = self.known.places.labels((owner, "out", None), call.outputs[0].shape[-1])
            self.known.set(call.outputs[0], made.expand(call.outputs[0].shape))
