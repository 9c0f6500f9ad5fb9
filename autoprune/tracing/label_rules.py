"""What operations without weights do to labels: move them by the same call, lay them over each other, or mix them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.tracing.labelled import Call, Labelled, tensors_in
from autoprune.tracing.labels import repeated, thinned

_SAME = "clone contiguous _to_copy detach alias lift_fresh lift dropout native_dropout"
_VIEWS = "view _unsafe_view reshape"
_MOVES = (
    "permute transpose t expand slice select split split_with_sizes unsafe_split unsafe_chunk chunk unbind cat stack "
    "squeeze unsqueeze roll flip pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle index "
    "index_select repeat unfold im2col reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d narrow repeat_interleave diagonal movedim unflatten constant_pad_nd as_strided"
)
_RUNS = "_softmax _log_softmax cumsum cumprod logcumsumexp sort topk"
_BATCH_NORMS = (
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "batch_norm_with_update _batch_norm_no_update miopen_batch_norm"
)
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
)
_FRESH = (
    "new_zeros new_ones new_empty new_full new_empty_strided zeros_like ones_like empty_like full_like rand_like "
    "randn_like fill zero bernoulli"
)
FRESH = frozenset(_FRESH.split())
"""They take a shape and no values."""
TENSORS = ("weight", "bias", "running_mean", "running_var")


def follow(known: Labelled, call: Call) -> None:
    """Give labels to what an operation without weights of its own gave."""
    given = [t for t in call.tensors if known.of(t) is not None]
    if not given or not call.outputs or call.name in FRESH:
        return
    rule = RULES.get(call.name)
    if rule is None:
        shrunk = "dim" in call.accepts and call.outputs[0].shape != given[0].shape
        rule = _reduce if shrunk else _element_by_element
    rule(known, call)


def contract(known: Labelled, call: Call, one: Tensor, two: Tensor) -> None:
    """[.., n, k] times [.., k, m]: what is summed over goes together, and with what it is multiplied by."""
    parts = [(known.of(one), -1), (known.of(two), -2)]
    merged = [known.places.merge(x, [d % x.dim()]) for x, d in parts if x is not None]
    if merged:
        known.set(call.outputs[0], known.places.meet(call.outputs[0].shape, [(x, x) for x in merged]))


def _batched(known: Labelled, call: Call) -> None:
    names = ("batch1", "batch2") if call.name == "baddbmm" else ("self", "mat2")
    contract(known, call, *(call.named[n] for n in names))


def _attend(known: Labelled, call: Call) -> None:
    query, key, value = (known.of(call.named[n]) for n in ("query", "key", "value"))
    if query is None or key is None or value is None:
        return
    query, key = known.places.merge(query, [2, 3]), known.places.merge(key, [2, 3])
    known.places.tie(query, key)
    value = known.places.merge(value, [2])
    known.places.tie(query, value)
    known.set(call.outputs[0], value.expand(call.outputs[0].shape))


def _keep(known: Labelled, call: Call) -> None:
    labels = next(x for t in call.tensors if (x := known.of(t)) is not None)
    known.set(call.outputs[0], labels.expand(call.outputs[0].shape))


def _view(known: Labelled, call: Call) -> None:
    known.set(call.outputs[0], repeated(_all(known, call.named["self"]).reshape(call.outputs[0].shape)))


def _move(known: Labelled, call: Call) -> None:
    """The very same call moves the labels; constants that it brings are nobody's."""
    args, kwargs = tree_map(lambda v: _all(known, v), (call.args, dict(call.kwargs)))
    if call.name == "constant_pad_nd":
        args, kwargs = (args[0], call.named["pad"], 0), {}
    if call.name == "as_strided":
        args = (args[0].contiguous(), *args[1:])
    for tensor, labels in zip(call.outputs, tree_leaves(call.func(*args, **kwargs)), strict=True):
        known.set(tensor, repeated(labels))


def _all(known: Labelled, value: Any) -> Any:
    """Labels in the place of a tensor of numbers, as large as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    labels = known.of(value)
    return (torch.zeros((), dtype=torch.float64) if labels is None else labels).expand(value.shape)


def _copy(known: Labelled, call: Call) -> None:
    """Values are written into a tensor; where that is a view, into a part of what it looks at.

    What was there is gone, but there must be as much of it.
    """
    target, source = call.named["self"], _all(known, call.named["src"])
    if (there := known.of(target)) is not None:
        known.places.meet(target.shape, [(there, target), (source, call.named["src"])])
    labels, base = source.expand(target.shape), target._base
    if base is not None and base.is_contiguous():
        whole = _all(known, base).clone(memory_format=torch.contiguous_format)
        whole.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(labels)
        known.set(base, repeated(whole))
    known.set(target, labels)


def _batch_norm(known: Labelled, call: Call) -> None:
    x = call.named["input"]
    vector = known.channels(x)
    if vector is not None:
        _lay_all(known, call, vector)
        known.set(call.outputs[0], known.of(x))


def _group_norm(known: Labelled, call: Call) -> None:
    """All channels of a norm group go together."""
    x = call.named["input"]
    vector = known.channels(x)
    if vector is not None:
        known.places.merge(vector.reshape(call.named["group"], -1), [1])
        _lay_all(known, call, vector)
        known.set(call.outputs[0], known.of(x))


def _layer_norm(known: Labelled, call: Call) -> None:
    x, labels = call.named["input"], known.of(call.named["input"])
    if labels is not None:
        known.places.merge(labels, range(x.dim() - len(call.named["normalized_shape"]), x.dim()))
        for name in TENSORS[:2]:
            if (along := known.of(call.named.get(name))) is not None:
                known.places.tie(labels, along)
        known.set(call.outputs[0], labels)


def _lay_all(known: Labelled, call: Call, vector: Tensor) -> None:
    for name in TENSORS:
        if (along := known.of(call.named.get(name))) is not None:
            known.places.tie(vector, along.reshape(-1))


def _run_along(known: Labelled, call: Call) -> None:
    """Values along a dimension decide on each other."""
    labels = known.of(call.named["self"])
    if labels is not None:
        known.places.merge(labels, [call.named.get("dim", -1) % max(labels.dim(), 1)])
        for out in call.outputs:
            if out.shape == labels.shape:
                known.set(out, labels)


def _gate(known: Labelled, call: Call) -> None:
    """One half of a dimension times a function of the other."""
    one, other = _all(known, call.named["self"]).chunk(2, call.named.get("dim", -1))
    known.places.tie(one, other)
    known.set(call.outputs[0], repeated(one))


def _reduce(known: Labelled, call: Call) -> None:
    x = call.tensors[0]
    dims, every = call.named.get("dim"), range(x.dim())
    listed = [dims] if isinstance(dims, int) else dims
    chosen = [d % x.dim() for d in listed] if listed else list(every)
    merged = known.places.merge(_all(known, x), chosen)
    kept = [d for d in every if d not in chosen]
    for out in call.outputs:
        if out.dim() == x.dim():
            known.set(out, merged.expand(out.shape))
        elif out.dim() == len(kept):
            known.set(out, merged.reshape([merged.shape[d] for d in kept]).expand(out.shape))


def _element_by_element(known: Labelled, call: Call) -> None:
    """By the shapes: what is as large as its operands together works element by element, else it mixes."""
    given = [(labels, t) for t in call.tensors if (labels := known.of(t)) is not None]
    whole = _broadcast(call.tensors)
    labels, x = given[0]
    for out in call.outputs:
        if out.shape == whole:
            known.set(out, known.places.meet(whole, [*given, *_tables(known, call, given)]))
        elif out.dim() == x.dim():
            differ = [d for d in range(x.dim()) if out.shape[d] != x.shape[d]]
            known.set(out, known.places.merge(labels.expand(x.shape), differ).expand(out.shape))
        else:
            for some, _ in given:
                known.places.lose(some, call.name.strip("_").replace("_", " "))


def _broadcast(tensors: Sequence[Tensor]) -> torch.Size | None:
    try:
        return torch.Size(torch.broadcast_shapes(*(t.shape for t in tensors)))
    except RuntimeError:
        return None


def _tables(known: Labelled, call: Call, given: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of the model of several dimensions, as labels along the one dimension in which channels lie."""
    for table in tensors_in(dict(call.named)):
        if id(table) not in known.names or known.of(table) is not None:
            continue
        for d in range(1, table.dim() + 1):
            lie = any(x.dim() >= d and thinned(x, [x.dim() - d]).shape[-d] > 1 for x, _ in given)
            if lie and table.shape[-d] > 1:
                labels = known.places.labels((known.names[id(table)], "carry", table.dim() - d), table.shape[-d])
                yield labels.view([-1] + [1] * (d - 1)), table
                break


Rule = Callable[[Labelled, Call], None]
RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), _keep),
    **dict.fromkeys(_VIEWS.split(), _view),
    **dict.fromkeys(_MOVES.split(), _move),
    **dict.fromkeys(_RUNS.split(), _run_along),
    **dict.fromkeys(_BATCH_NORMS.split(), _batch_norm),
    **dict.fromkeys(_ATTENTION.split(), _attend),
    **dict.fromkeys(("bmm", "baddbmm"), _batched),
    **{"native_group_norm": _group_norm, "native_layer_norm": _layer_norm, "glu": _gate, "copy": _copy},
}
