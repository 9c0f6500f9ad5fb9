"""The two repairs of a pruned network that cost forward passes only: fixed-point batch norm and the sequential refit.

Both are one pass of the pruned model over samples that the dense model has seen (ALGORITHMS 2b); both leave the dense
model exactly as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.database.masking import within
from autoprune.database.rounding import by_channel, compensated
from autoprune.database.stitch import Stitcher
from autoprune.evaluator.dense_reference import (
    REFIT_POSITIONS,
    Measured,
    Moments,
    Reference,
    measured,
    norm_ids,
    pooled,
    positions_of,
)
from autoprune.evaluator.lock_step import Meet, alone
from autoprune.evaluator.precision import computed_dtype, exactly, widened
from autoprune.evaluator.ridge import Rows, Settle, ridge_over, shrunk
from autoprune.tracing.calls import (
    ADDS,
    LINEAR,
    Call,
    NormCall,
    from_matrix,
    kept_dim,
    output_count,
    outputs_at,
    parse_call,
    parse_norm,
    pick_positions,
    rows,
    run_folded,
    same_rows,
    to_matrix,
    undropped,
)
from autoprune.tracing.padding import real_rows
from autoprune.tracing.rounding import nearest
from autoprune.tracing.wiring import Site, batch_norms

SILENT = 1e-6
"""A batch norm scale below which an output says nothing, so that nothing can be fitted to it."""
LEAST = 1e-12
"""The least variance that is divided by: a dead channel has none in either network."""


class FixedPoint(TorchFunctionMode):
    """Corrects every batch norm relative to the dense network on the same batch; the dense network is a fixed point.

    mean' = m + (mean - m_dense) sqrt(v / v_dense), var' = var * v / v_dense (ALGORITHMS 2b): a scaled and shifted
    activation gets exactly the scaled and shifted statistics. With `settle` they are written into the model; else they
    hold for this batch alone, or for those that it meets.
    """

    def __init__(self, stitcher: Stitcher, reference: Reference, settle: bool, meet: Meet = alone) -> None:
        super().__init__()
        self.stitcher, self.reference, self.settle, self.meet = stitcher, reference, settle, meet
        self.norms = norm_ids(stitcher.model)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        norm = parse_norm(func, args, kwargs)
        name = self.norms.get(id(norm.mean), "") if norm is not None else ""
        if norm is None or name not in self.reference.norms:
            return func(*args, **kwargs)

        def found(pieces: Sequence[Measured]) -> Moments:
            mean, var = correct(self.stitcher, name, pooled(pieces), self.reference.norms[name])
            if self.settle:
                norm.mean.data, norm.var.data = mean, var
                self.stitcher.mark_dirty({f"{name}.running_mean", f"{name}.running_var"})
            return mean, var

        mean, var = self.meet(name, measured(norm.x), found)
        return norm.run(mean=mean, var=var)


class Folded(TorchFunctionMode):
    """Runs a model with its batch norms folded into the weights before them: the same outputs, a sixth faster.

    `sites` say which norm alone reads which weight's output; transposed convolutions run as they are.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        super().__init__()
        norms, parameters = batch_norms(model), dict(model.named_parameters())
        self.norm_of = {
            id(parameters[name]): norms[site.norm]
            for name, site in sites.items()
            if name in parameters and site.norm in norms and site.kind != "transposed"
        }
        self.skip = {id(norm.running_mean) for norm in self.norm_of.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = parse_call(func, args, kwargs or {})
        norm = self.norm_of.get(id(call.weight)) if call is not None else None
        if call is not None and norm is not None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            given = NormCall(call.x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
            return run_folded(call, given)
        seen = parse_norm(func, args, kwargs or {})
        if seen is not None and id(seen.mean) in self.skip:
            return seen.x
        return func(*args, **(kwargs or {}))


def correct(stitcher: Stitcher, norm: str, pruned: Moments, dense: Moments) -> Moments:
    """The fixed-point statistics of one batch norm at the stitched widths."""
    name = f"{norm}.running_mean"
    kept = stitcher.kept(name, 0)
    mean, var = stitcher.dense[name], stitcher.dense[f"{norm}.running_var"]
    (m, v), (md, vd) = pruned, dense
    if kept is not None:
        mean, var, md, vd = mean[kept], var[kept], md[kept], vd[kept]
    ratio = v.clamp_min(LEAST) / vd.clamp_min(LEAST)
    scale = ratio.sqrt()
    return mean * scale + (m - md * scale), var * ratio  # in this order the dense network's own are returned exactly


class Refit(TorchFunctionMode):
    """Walks the pruned network once; each consumer of a group is fitted from its pruned inputs to the dense targets.

    Ridge regression shrunk towards the database's weights. Where the consumer closes a residual branch, its target is
    the dense sum minus the pruned shortcut; until that is known, a placeholder stands for its output. Batch norms
    stay in place: one behind a fitted weight takes the intercept in its mean, the others are corrected as FixedPoint
    does. Nothing is touched before the first narrowed tensor (of a network without all of its blocks all is fitted), so
    the dense policy is exact. Where the samples come in
    several batches each has a Refit of its own, and what is fitted is fitted to all of them, where they `meet`. `real`
    says which tokens are no padding (`real_tokens`).
    """

    def __init__(
        self,
        stitcher: Stitcher,
        reference: Reference,
        sites: Mapping[str, Site],
        meet: Meet = alone,
        real: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.stitcher, self.reference, self.sites, self.meet, self.real = stitcher, reference, sites, meet, real
        self.norms = norm_ids(stitcher.model)
        self.names = {id(p): n for n, p in stitcher.model.named_parameters()}
        self.narrowed, self.changed = stitcher.narrowed(), bool(stitcher.absent)
        self.settled: set[str] = set()  # batch norms behind fitted weights
        self.waiting: dict[int, _Waiting] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (same := undropped(func, args, kwargs)) is not None:
            return same
        held = next((self.waiting[id(a)] for a in args if isinstance(a, Tensor) and id(a) in self.waiting), None)
        if held is not None:
            return self._with_placeholder(held, func, args, kwargs)
        call = parse_call(func, args, kwargs)
        if call is not None:
            return self._weighted(call)
        norm = parse_norm(func, args, kwargs)
        if norm is not None and id(norm.mean) in self.norms:
            return self._normed(self.norms[id(norm.mean)], norm)
        return func(*args, **kwargs)

    def _weighted(self, call: Call) -> Tensor:
        name = self.names.get(id(call.weight), "")
        self.changed = self.changed or name in self.narrowed
        if not self.changed or name not in self.reference.targets:
            return call.run()
        site = self.sites[name]
        if not site.closes:
            target = widened(self.reference.targets[name])
            keep = self._kept_rows(site)
            self._fit(site, call, target if keep is None else target[:, keep])
            return call.run()
        if site.overwritten:  # by an operation in place, before the sum is known
            call = replace(call, x=call.x.clone())
        empty = _placeholder(call)
        self.waiting[id(empty)] = _Waiting(site, call, empty, empty.shape)
        return empty

    def _normed(self, name: str, norm: NormCall) -> Tensor:
        self.changed = self.changed or f"{name}.running_mean" in self.narrowed
        if self.changed and name not in self.settled and name in self.reference.norms:

            def correction(pieces: Sequence[Measured]) -> None:
                found = correct(self.stitcher, name, pooled(pieces), self.reference.norms[name])
                norm.mean.data, norm.var.data = found
                self.stitcher.mark_dirty({f"{name}.running_mean", f"{name}.running_var"})

            self.meet(name, measured(norm.x), correction)
        return norm.run()

    def _with_placeholder(self, held: _Waiting, func: Any, args: Any, kwargs: Any) -> Any:
        norm = parse_norm(func, args, kwargs)
        if norm is not None and held.norm is None and self.norms.get(id(norm.mean)) == held.site.norm:
            held.norm = norm
            return held.empty
        if func in ADDS:
            other = args[1] if args[0] is held.empty else args[0]
            self._fit(held.site, held.call, *self._branch_target(held, other))
            del self.waiting[id(held.empty)]
        else:
            looked = func(*args, **kwargs)
            if not isinstance(looked, Tensor):
                return looked  # a look at its shape
            if same_rows(func, args, looked):
                self.waiting[id(looked)] = self.waiting.pop(id(held.empty))
                held.empty = looked
                return looked
        out = func(*((y := held.output()) if a is held.empty else a for a in args), **kwargs)
        if out is y:  # in place: whoever holds the placeholder must see the sum
            held.empty.data = out
            return held.empty
        return out

    def _branch_target(self, held: _Waiting, shortcut: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dense sum minus pruned shortcut, taken back through the batch norm, and the rows where that is possible."""
        site, keep = held.site, self._kept_rows(held.site)
        target = widened(self.reference.targets[site.weight])
        shortcut = shortcut.reshape(held.shape)
        target = (target if keep is None else target[:, keep]) - outputs_at(
            site.kind, shortcut, positions_of(site.kind, shortcut)
        )
        if held.norm is None:
            return target, None
        n = held.norm
        scale = (n.var + n.eps).rsqrt() * (1.0 if n.gamma is None else n.gamma)
        alive = scale.abs() > SILENT
        target = (target - (0.0 if n.beta is None else n.beta)) / torch.where(alive, scale, 1.0) + n.mean
        return target, alive

    def _fit(self, site: Site, call: Call, target: Tensor, alive: Tensor | None = None) -> None:
        """Fit the weight to all batches and write it where it belongs; rows that are not `alive` stay."""
        positions = pick_positions(output_count(call), REFIT_POSITIONS, seed=1)

        def solved(pieces: Sequence[Rows]) -> None:
            self._solve(site, call, pieces, alive)

        inputs, targets = widened(rows(call, positions)), target.unflatten(1, (call.groups, -1)).transpose(0, 1)
        real = real_rows(call.x.shape, positions, self.real) if call.kind in LINEAR else None
        if real is not None:
            inputs, targets = inputs[:, real], targets[:, real]
        self.meet(site.weight, (inputs, targets), solved)
        if site.norm is not None:
            self.settled.add(site.norm)

    def _solve(self, site: Site, call: Call, pieces: Sequence[Rows], alive: Tensor | None) -> None:
        """Solve, and write the weight and its intercept."""
        kernel, live, dirty = call.weight.shape[2:], self.stitcher.live, {site.weight}
        prior = to_matrix(call.weight, call.kind, call.groups)
        intercept = site.bias is not None or site.norm is not None
        with exactly(call.weight.device):
            weight, shift = ridge_over(pieces, prior.flatten(2), intercept, self._settle(site, prior))
        if alive is not None:
            weight = torch.where(alive.view(call.groups, -1, 1), weight, prior.flatten(2))
            shift = torch.where(alive, shift, 0.0 if site.bias is None else live[site.bias])
        native = from_matrix(weight.view_as(prior), call.kind, kernel)
        live[site.weight].data = self.stitcher.laid_out(site.weight, native.contiguous())
        if site.bias is not None:
            live[site.bias].data = shift
            dirty.add(site.bias)
        elif site.norm is not None:
            mean = live[f"{site.norm}.running_mean"]
            mean.data = mean - shift
            dirty.add(f"{site.norm}.running_mean")
        self.stitcher.mark_dirty(dirty)

    def _settle(self, site: Site, prior: Tensor) -> Settle | None:
        """What the policy makes of the fitted weight: its zeros, and numbers that fewer bits hold."""
        mask, rounds = self.stitcher.masks.get(site.weight), self.stitcher.rounds(site.weight)
        if mask is None and not rounds:
            return None
        alive = None if mask is None else to_matrix(mask, site.kind, site.groups).flatten(2)

        def settle(weight: Tensor, second: Tensor) -> Tensor:
            if alive is not None:
                parts = zip(alive, prior.flatten(2), weight, shrunk(second), strict=True)
                weight = torch.stack([within(*part) for part in parts])
            return rounded(weight, second) if rounds else weight

        def rounded(weight: Tensor, second: Tensor) -> Tensor:
            native = from_matrix(weight.view_as(prior), site.kind, self.stitcher.live[site.weight].shape[2:])
            if site.groups > 1:
                found = nearest(native, kept_dim(site.kind))
            else:
                factor = by_channel(second[0], prior.shape[2])
                found = compensated(native, site.kind, [factor], zeros=alive is not None)
            return to_matrix(found.weight, site.kind, site.groups).flatten(2).to(weight.dtype)

        return settle

    def _kept_rows(self, site: Site) -> Tensor | None:
        """Kept outputs of a weight."""
        kept = self.stitcher.kept(site.weight, kept_dim(site.kind))
        if kept is None or site.groups == 1 or site.kind != "transposed":
            return kept
        wide = self.stitcher.dense[site.weight].shape[1]
        return (torch.arange(site.groups, device=kept.device)[:, None] * wide + kept).flatten()


@dataclass
class _Waiting:
    """A consumer whose output, of this shape, is not known before the other operand of its addition."""

    site: Site
    call: Call
    empty: Tensor
    shape: torch.Size
    norm: NormCall | None = None

    def output(self) -> Tensor:
        if self.norm is None:
            return self.call.run().reshape(self.empty.shape)
        if self.call.kind == "transposed":
            return self.norm.run(self.call.run())
        return run_folded(self.call, self.norm).reshape(self.empty.shape)


def _placeholder(call: Call) -> Tensor:
    """A tensor of the call's output shape that costs neither memory nor time."""
    if call.kind in LINEAR:
        shape = (*call.x.shape[:-1], call.weight.shape[kept_dim(call.kind)])
    else:
        kwargs = {k: v for k, v in (call.kwargs or {}).items() if k not in ("weight", "bias")}
        shape = tuple(call.func(call.x.to("meta"), call.weight.to("meta", call.x.dtype), None, **kwargs).shape)
    return call.x.new_zeros((), dtype=computed_dtype(call.x)).expand(shape)
