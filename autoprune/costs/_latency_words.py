"""Where the time goes that the multiply-accumulates do not account for, in one line."""

from __future__ import annotations

from collections.abc import Mapping

PARTS = {
    "narrowed": "operations that groups narrow",
    "untouched": "operations that no group narrows",
    "written": "values written (norms, activations, sums)",
    "fixed": "what no width changes (starting operations)",
}
"""What `Latency.parts` tells apart, in words."""
LEAST = 0.005
"""A part that stays below it, dense and pruned, is not named."""
OF_ZEROS = ("sparse_csr", "semi_structured")
"""Runtimes that may be faster for zeros."""
UNKNOWN = (
    "the difference is what does not shrink with them: starting operations, reading and writing activations, "
    "operations that no group narrows, and widths between the steps of the kernels"
)


def time_words(macs: float, latency: Mapping[str, float], dense: Mapping[str, float] | None = None) -> str:
    """What of the time is left where so much of the MACs is, and where the rest goes; the former where no MACs went.

    `latency` is a measured `ratio`, perhaps with the parts that a latency table gives it; `dense` has the parts of the
    dense model.
    """
    if macs >= 1:
        return f"with the shapes of the dense model it takes {latency['ratio']:.2f} of the time"
    return f"{macs:.2f} of the MACs take {latency['ratio']:.2f} of the time; {rest_words(latency, dense)}"


def rest_words(pruned: Mapping[str, float] | None, dense: Mapping[str, float] | None) -> str:
    """What the time is made of by a latency table; without the parts of both models, in words what it may be."""
    if pruned is None or dense is None or any(name not in pruned or name not in dense for name in PARTS):
        return UNKNOWN
    shown = [name for name in PARTS if max(dense[name], pruned[name]) >= LEAST]
    lines = ", ".join(f"{PARTS[name]} {_change(dense[name], pruned[name])}" for name in shown)
    total = sum(pruned[name] for name in PARTS)
    return f"by the latency table, in shares of the dense time: {lines}; together {total:.2f}"


def same_shape_words(runtime: str, zeros: bool) -> str:
    """What to expect of the time on a runtime where no shape has changed; "" where it may know zeros."""
    if zeros and (runtime in OF_ZEROS or ":" in runtime):  # of a runtime of the user's own nothing is known
        return ""
    why = f"{runtime} takes zeros for numbers like others" if zeros else "its shapes are those of the dense model"
    return f"{why}, so that no gain is expected"


def _change(before: float, after: float) -> str:
    still = f"{before:.2f}" == f"{after:.2f}"
    return f"{after:.2f} as before" if still else f"{before:.2f} -> {after:.2f}"
