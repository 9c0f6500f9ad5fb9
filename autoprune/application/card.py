"""The model card of an applied folder: its README.md, from apply.json and the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autoprune.application.plain import recipe
from autoprune.costs._latency_words import rest_words, same_shape_words
from autoprune.front import Point
from autoprune.front_table import OF_SHAPES

FILES = {
    "model.safetensors": "the weights",
    "masks.safetensors": "where the values of masked weights stand: a bit a number, the first the highest of its byte",
    "policy.json": "the policy: which atoms of which group are kept",
    "apply.json": "the figures of this card, and what the plain recipe below reads",
    "config.json": "the dense model's configuration, from which `autoprune.load` builds it",
    "hf-uniform": "a folder of transformers' own, for `from_pretrained`",
    "model.onnx": "ONNX, for onnxruntime and others; the batch is free",
    "model.int8.onnx": "ONNX with 8-bit weights and activations",
    "model.xml": "OpenVINO, with its weights in `model.bin`; the batch is free",
    "model.bin": "the weights of `model.xml`",
    "model.mlpackage": "Core ML; converted only: nothing but macOS runs it, so its outputs are not checked",
    "model.pt2": "read by `torch.export.load`, without the model's code",
}

COSTS = {
    "macs": "multiply-accumulates a sample",
    "params": "parameters",
    "nonzeros": "weights that are not zero",
    "effective_macs": "multiply-accumulates a sample with weights that are not zero",
}
"""What the table says of absolute costs."""
NAMED = 3
"""Weights that a line names one by one."""

FORMATS = {
    "dense": "dense",
    "mask": "bits and values, as in this folder",
    "csr": "CSR, the smallest types of indices",
}


def card(facts: Mapping[str, Any], point: Point) -> str:
    """README.md of the folder that holds `point`, applied; `facts` are those of apply.json, as many as there are."""
    facts = {"macs_ratio": point.ratio("macs"), "atoms": "as the policy says", "recipe": {}, "files": [], **facts}
    parts = [
        f"# {point.base.model}, pruned to {extent(facts)}",
        _opening(facts, point),
        *transferred(facts),
        "\n".join(["| | dense | pruned |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows(facts))]),
        *timing(facts),
        *zeros(facts),
        *_failed(facts),
        "\n".join(_made(facts, point)),
        "\n".join(_loading(facts)),
        "\n".join(_files(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def extent(facts: Mapping[str, Any]) -> str:
    """How much is left: of the multiply-accumulates, of weights, and of the time where that was measured.

    Where the search counted weights that are not zero, all prunable ones are meant, and no MACs named that are dense.
    """
    counted, told, found = (facts.get("costs") or {}).get("nonzeros"), facts.get("zeros"), facts.get("latency")
    said = [] if counted and _same_shapes(facts) else [f"{facts['macs_ratio']:.1%} of its multiply-accumulates"]
    if counted:
        said.append(f"{counted['pruned'] / counted['dense']:.1%} of its prunable weights")
    elif told:
        said.append(f"{told['density']:.1%} of the numbers in its masked weights")
    return ", ".join([*said, *([f"{found['ratio']:.0%} of its latency"] if found else [])])


def _same_shapes(facts: Mapping[str, Any]) -> bool:
    """Whether nothing became smaller: at most zeros or fewer bits are in it."""
    costs = facts.get("costs") or {}
    same = all(costs[name]["dense"] == costs[name]["pruned"] for name in OF_SHAPES if name in costs)
    return bool(facts["macs_ratio"] == 1 and same)


def _opening(facts: Mapping[str, Any], point: Point) -> str:
    """What this is; what it is not, where no data were there."""
    said = f"Point `{point.id}` of a search by autoprune. "
    if _smaller(point) or "zeros" not in facts:
        said += "Whole channels, heads, neurons or blocks are gone, so it is a smaller dense model of the same class; "
    else:
        said += "Weights of it are zero and its shapes are those of the dense model, so it is of the same class; "
    said += "its inputs and outputs are those of the dense one."
    if (
        facts.get("test") is None
        and facts.get("validation") is None
        and facts["recipe"].get("recipe", "none") == "none"
    ):
        said += (
            "\n\n**Cut by shapes alone, without data**: the weights that stay are as they were. Nothing was "
            "compensated, no batch norm corrected, nothing trained and nothing scored, so it is worse than the front "
            "promises. Apply it with `--task` and a job to have all of that."
        )
    return said


def _smaller(point: Point) -> bool:
    """Whether the policy removes anything, beside weights and bits."""
    widths = point.policy.as_dict()
    return any(widths[g.name] < g.width for g in point.base.groups if not g.matrices)


def transferred(facts: Mapping[str, Any]) -> Iterator[str]:
    """What is to be known of a policy that was carried over from another structure."""
    if told := facts.get("transfer"):
        yield str(told["said"])
        if losses := told.get("losses"):
            words = {"transfer": "transferred", "uniform": "uniform", "search": "a search of its own"}
            found = {words[k]: "failed" if v is None else f"{v:.4g}" for k, v in losses.items() if k in words}
            values = ", ".join(f"{name} {value}" for name, value in found.items())
            yield f"{losses['name']} on validation at this cost, repaired and not trained: {values}"


def rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(what, dense, pruned) for all that is known of both: the task's metrics on test, and what both cost."""
    test = facts.get("test") or {}
    for name, value in (test.get("dense") or {}).items():
        yield f"{name} on the test split".replace("_", " "), f"{value:.4g}", f"{test['pruned'][name]:.4g}"
    costs = facts.get("costs") or {}
    for name in (n for n in COSTS if n in costs):
        dense, pruned = f"{costs[name]['dense']:,}", f"{costs[name]['pruned']:,}"
        yield COSTS[name], dense, "the same" if dense == pruned else pruned
    sizes = facts.get("bytes") or {}
    if sizes:
        yield "bytes of weights on disk", f"{sizes['dense']:,}", f"{sizes['pruned']:,}"
    if eight := facts.get("int8"):
        for name, value in (eight["test"] or {}).items():
            yield f"{name}, int8 file".replace("_", " "), "", f"{value:.4g}"
        yield "bytes of the int8 file", "", f"{eight['bytes']:,}"
    if found := facts.get("latency"):
        own = found["dense_ms"] * found["ratio"]
        yield f"latency, ms ({_where(found)})", f"{found['dense_ms']:.3g}", f"{own:.3g}"


def _where(found: Mapping[str, Any]) -> str:
    return f"{found['runtime']}, batch {found['batch_size']}, {_threads(found['threads'])}"


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def timing(facts: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on the measured latency, if there is one: how much is left and where the rest goes; the 8-bit file."""
    if found := facts.get("latency"):
        said = (
            f"Latency is {found['ratio']:.2f} of dense (interquartile range {found['iqr']:.2f}, {found['rounds']} "
            f"rounds in turns, {found['device']})"
        )
        yield f"{said}{_rest(facts, found)}."
        if "instead_of" in found:
            yield f"It was measured in this way, for another did not go: {found['instead_of']}"
    if eight := facts.get("int8"):
        timed = eight["latency"]
        why = f". It is not faster here: {eight['reason']}" if "reason" in eight else ""
        yield (
            f"`model.int8.onnx` ({eight['way']} ranges) takes {timed['ratio']:.2f} of the time of `model.onnx` "
            f"(interquartile range {timed['iqr']:.2f}), on {_threads(timed.get('threads', 1))} of this machine{why}."
        )


def _rest(facts: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where the rest of the time goes; where no shape has changed, what zeros do to it."""
    if _same_shapes(facts):
        said = same_shape_words(found["runtime"], "zeros" in facts)
        return said and f"; {said}"
    parts = found.get("parts") or {}
    rest = rest_words(parts.get("pruned"), parts.get("dense"))
    return f" at {facts['macs_ratio']:.2f} of the multiply-accumulates; {rest}"


def zeros(facts: Mapping[str, Any]) -> Iterator[str]:
    """The section on zeros, if there are any: how many, what they weigh by format, density and pattern by layer."""
    if not (told := facts.get("zeros")):
        return
    layers, total = told["layers"], f"{told['nonzeros']:,} of the {told['weights']:,} numbers"
    yield "## Zeros"
    yield f"{total} in masked weights are not zero ({told['density']:.1%}). {_densities(layers)}"
    for pattern in sorted({layer["pattern"] for layer in layers.values() if "pattern" in layer}):
        held = [name for name, layer in layers.items() if layer.get("pattern") == pattern]
        some = ", ".join(held) if len(held) <= NAMED else f"{len(held)} of the {len(layers)} weights"
        who = "all of them" if len(held) == len(layers) else some
        yield f"At most {pattern.replace(':', ' of every ')} inputs that lie side by side are not zero: {who}."
    sizes = told["bytes"]
    kinds = list(sizes["dense"])
    heads = {"plain": "bytes", "zstd": "after zstd"}
    table = [f"| format of these weights | {' | '.join(heads[k] for k in kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    table += [f"| {FORMATS[f]} | {' | '.join(f'{own[k]:,}' for k in kinds)} |" for f, own in sizes.items()]
    yield "\n".join(table)


def _densities(layers: Mapping[str, Any]) -> str:
    """The densities of a few weights; of many the least, the middle and the most."""
    ranked = sorted(layers, key=lambda name: float(layers[name]["density"]))
    few = len(ranked) <= NAMED
    named = list(layers) if few else [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    said = [f"{name} {layers[name]['density']:.3g}" for name in named]
    if few:
        return f"By weight: {', '.join(said)}."
    return f"Of {len(ranked)} weights the least dense is {said[0]}, the middle one {said[1]}, the densest {said[2]}."


def _made(facts: Mapping[str, Any], point: Point) -> Iterator[str]:
    """How it came to be: the recipe, seeds and versions."""
    space, told = point.base.space, dict(facts.get("recipe") or {})
    yield "## How it was made"
    yield ""
    yield f"- criterion `{space.get('criterion', 'obs')}`, granularity `{space.get('granularity')}`"
    yield f"- atoms {facts['atoms']}"
    words = ", ".join(f"{key} {value}" for key, value in told.items() if key != "recipe")
    yield f"- training after the cut: {told.get('recipe', 'none')}{f' ({words})' if words else ''}"
    before = (facts.get("course") or {}).get("before")
    told_of = {"validation before training": before, "validation": facts.get("validation")}
    for split, promise in {**told_of, "the front's promise": facts.get("promised")}.items():
        if promise:
            figures = {promise["loss"]["name"]: promise["loss"]["loss"], **promise["metrics"]}
            yield f"- {split}: {', '.join(f'{k} {v:.4g}' for k, v in figures.items())}"
    if facts.get("verification_error") is not None:
        yield f"- against the masked dense model it differs by {facts['verification_error']:.1e} (relative)"
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    yield f"- made with {versions}"


def _loading(facts: Mapping[str, Any]) -> Iterator[str]:
    """By autoprune, and the plain one."""
    yield "## How to load it"
    yield ""
    yield "```python"
    yield "import autoprune"
    yield 'model = autoprune.load("FOLDER")  # add factory=..., what makes the dense model, where it is your own'
    yield "```"
    yield ""
    if "rebuild" not in facts:  # of a folder of an earlier version
        return
    if own := facts["rebuild"]["own"]:
        yield f"Without autoprune it cannot be rebuilt from its class ({own[0]} is another module now); take an export."
        return
    yield "Without autoprune, from the dense model's own code:"
    yield ""
    yield "```python"
    yield recipe("zeros" in facts).rstrip()
    yield ""
    yield 'model = pruned(build(), "FOLDER")  # build(): the dense model, from your code'
    yield "```"


def _failed(facts: Mapping[str, Any]) -> Iterator[str]:
    for line in facts.get("failed") or ():
        yield f"**Not written**: {line}"


def _files(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "## Files"
    yield ""
    for path in facts["files"]:
        name = str(path).rpartition("/")[2]
        yield f"- `{name}`: {FILES.get(name, 'this card' if name == 'README.md' else 'an export')}"
