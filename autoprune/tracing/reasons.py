"""Why something is frozen, in a user's words: known before any experiment, or an explanation of one that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from autoprune.tracing.atoms import NORMS, Candidate, axis_size
from autoprune.tracing.certify import CRASH
from autoprune.tracing.claims import below
from autoprune.tracing.slim import expected_attributes
from autoprune.tracing.suspects import PRODUCT
from autoprune.tracing.watch import Trace, is_producer, multiplies

OUTPUT = "its channels are the model's output"
RECURRENT = "recurrent layers are not pruned"
NO_READER = "what reads its channels is no layer that the trace knows (a raw weight, a reshape or a product of them)"
TOGETHER = "its channels could only go all together"
ATTENTION = "attention is not pruned by channels"
QUANTISED = "a quantised layer keeps its weight packed, and that is not narrowed: prune first, quantise afterwards"
SCRIPT = "TorchScript is compiled and cannot be cut: use the plain nn.Module that it was made of"

_COMPUTED = "weight_norm, spectral_norm or another parametrization"
REMOVE = "make it plain first, by torch.nn.utils.parametrize.remove_parametrizations or prune.remove"
OVER_ALL = "normalises over all its channels"
DECIDES = "decides by the data"

CLOSED = (RECURRENT, ATTENTION, SCRIPT, QUANTISED)


def module_reasons(model: nn.Module, trace: Trace, firm: bool = False) -> dict[str, str]:
    """Module name -> why its own tensors may not be narrowed; modules that are fine are left out.

    Some reasons only hold for channels that a graph follows; those that hold anyway are `firm`.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        said = any(below(name, other) for other in found)  # what is inside a module goes with it
        if not said and (reason := _module_reason(name, module, trace, firm)):
            found[name] = reason
    return found


def known_reason(candidate: Candidate, trace: Trace, modules: Mapping[str, str]) -> str:
    """Why `candidate` cannot be searched, as far as one sees without an experiment; "" if it may."""
    if reason := _decision(candidate, trace) or _neighbour(candidate, trace, modules):
        return reason
    if _feeds(candidate, trace, trace.outputs):
        return OUTPUT
    if candidate.group is None:
        return explain(candidate, trace, candidate.reason)
    if candidate.width < 2:
        return explain(candidate, trace, TOGETHER)
    read = any(s.role == "consume" for s in candidate.group.slices)
    return "" if read else explain(candidate, trace, NO_READER)


def worth_another_look(reason: str) -> bool:
    """Whether what is frozen for `reason` might be followed in another way."""
    return reason != OUTPUT and not any(words in reason for words in (*CLOSED, DECIDES, OVER_ALL, PRODUCT))


def attends(candidate: Candidate, trace: Trace) -> bool:
    """Whether the channels are multiplied with other activations: what goes there is no channel, but a head."""
    return any(words.startswith(PRODUCT) for _, _, words in _suspects(candidate.producers, trace))


def explain(candidate: Candidate, trace: Trace, complaint: str) -> str:
    """`complaint`, led by the operation on the channels' way that best explains it, if one was seen."""
    shared = next((trace.shared[m] for m in candidate.modules if m in trace.shared), "")
    complaint = f"{shared}; {complaint}" if shared and complaint else complaint
    for producers in (candidate.producers, candidate.related):
        if seen := _suspects(producers, trace):
            rank, _, words = min(seen)
            plain = CRASH if complaint.startswith(CRASH) else complaint  # the reason says more than its sizes
            return words if rank == 0 and plain in (CRASH, NO_READER, TOGETHER) else f"{words}; {plain}"
    return complaint


def doubted(candidate: Candidate, trace: Trace) -> bool:
    """Whether something on the channels' way is likely to fail the experiment."""
    return bool(_suspects(candidate.producers, trace))


def _suspects(producers: Sequence[str], trace: Trace) -> list[tuple[int, int, str]]:
    """(rank, order, words) of the operations that the channels of `producers` meet."""
    return [
        (rank, i, words)
        for i, (rank, words, nodes) in enumerate(trace.suspects)
        if not trace.sources(nodes).isdisjoint(producers)
    ]


def _decision(candidate: Candidate, trace: Trace) -> str:
    """The module that branches on data which the channels are part of, or which holds layers of theirs."""
    for place, function in trace.decisions.items():
        if any(below(m, place) for m in candidate.modules) or _feeds(candidate, trace, trace.inputs.get(place, ())):
            return f"{_place(place)} {DECIDES} (Tensor.{function}), so one trace does not show every branch"
    return ""


def _neighbour(candidate: Candidate, trace: Trace, modules: Mapping[str, str]) -> str:
    """The module on the channels' way that may not be narrowed."""
    for touched in candidate.modules:
        for name in (touched, touched.rpartition(".")[0]):  # a raw parameter goes by its own name, not its module's
            if name in modules:
                return modules[name] if name in candidate.producers else f"it meets {name!r}: {modules[name]}"
    for name, reason in modules.items():
        if reason.startswith(CLOSED) and _feeds(candidate, trace, trace.inputs.get(name, ())):
            return f"it feeds {name!r}: {reason}"
    return ""


def lost_reason(name: str, module: nn.Module, trace: Trace) -> str:
    """Why a producer belongs to no candidate at all."""
    if name not in trace.order:
        return _unreached(list(module.parameters(recurse=False)), trace)
    return "the trace loses it: no gradient path leads from it to the output (torch.no_grad, detach, or unused)"


def _module_reason(name: str, module: nn.Module, trace: Trace, firm: bool) -> str:
    if reason := _closed(module):
        return reason
    own = list(module.parameters(recurse=False))
    if not firm and multiplies(module):
        return "a depthwise convolution with a multiplier makes several channels of each"
    if parametrize.is_parametrized(module) or _computes_weight(module):
        return f"its weight is computed from other tensors ({_COMPUTED}); {REMOVE}"
    if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        if firm and module.affine:
            return ""
        share = module.num_channels // module.num_groups
        over = f"each {share} neighbouring channels" if share > 1 else "each channel by itself"
        return f"GroupNorm normalises over {over}, and its groups are not narrowed"
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.LocalResponseNorm):
        return f"{type(module).__name__} {OVER_ALL}"
    if isinstance(module, NORMS) and not expected_attributes(module):
        return f"{type(module).__name__} without parameters and statistics cannot tell its width"
    if reason := _used_elsewhere(name, own, trace, firm):
        return reason
    if own and name not in trace.order and not (firm and any(id(p) in trace.touched for p in own)):
        return _unreached(own, trace)
    plain = firm and isinstance(module, nn.ParameterList | nn.ParameterDict)
    known = axis_size(module, "out") or plain or not own or not type(module).__module__.startswith("torch.")
    return "" if known else f"autoprune does not know how to narrow {type(module).__name__}"


def _closed(module: nn.Module) -> str:
    """Why nothing that feeds a module may be narrowed, for it cannot be looked into."""
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPT
    if type(module).__module__.startswith("torch.ao.nn.") and ".quantized." in type(module).__module__:
        return QUANTISED
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"{RECURRENT} ({type(module).__name__})"
    return f"{ATTENTION} (MultiheadAttention)" if isinstance(module, nn.MultiheadAttention) else ""


def _used_elsewhere(name: str, own: Sequence[nn.Parameter], trace: Trace, firm: bool) -> str:
    for parameter in own:
        users = trace.users.get(id(parameter), set())
        if foreign := users.difference(trace.owners.get(id(parameter), ())):
            return f"its weights are used outside its own forward (in {_place(min(foreign))})"
        if len(users) > 1 and not firm:
            return f"{trace.shared[name]}, and both use it"
    return ""


def _unreached(own: Sequence[nn.Parameter], trace: Trace) -> str:
    """Of a module that was not called: whether something else reads its parameters."""
    used = any(id(p) in trace.touched for p in own)
    return "its parameters are used outside of any forward of its own" if used else "the example inputs never reach it"


def _computes_weight(module: nn.Module) -> bool:
    return (is_producer(module) or isinstance(module, NORMS)) and "weight" not in module._parameters


def _place(name: str) -> str:
    return repr(name) if name else "the model's forward"


def _feeds(candidate: Candidate, trace: Trace, nodes: Sequence[object]) -> bool:
    return not trace.sources(nodes).isdisjoint(candidate.producers)
