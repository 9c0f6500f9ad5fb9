"""What is found in the models that people use, one row a model of timm or transformers: random weights, one thread.

usage: OMP_NUM_THREADS=1 python -m benchmarks.zoo [resnet18 BertModel ...]   [--stub]   (needs timm and torchvision, or
transformers for its classes)

Images are noise, sentences of 128 random tokens; a class of transformers has its default size, or that of a small model
of its family (SmolLM-135M, Pythia-160M).

Rows are kept in results/zoo.json as they come, and shown in results/zoo.md; what is kept is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from autoprune.errors import InputError, one_line
from autoprune.families import analysed
from autoprune.structure import Structure

NAMES = (
    *("resnet18", "resnet50", "densenet121", "vgg16", "mobilenetv3_large_100", "efficientnet_b0", "convnext_tiny"),
    *("vit_small_patch16_224", "resnet26d", "resnetblur18", "seresnet18", "skresnet18", "resnest14d", "resnetv2_50"),
    *("resnext26ts", "res2net50_26w_4s", "ecaresnet26t", "cspresnet50", "darknet17", "ese_vovnet19b_dw", "dla34"),
    *("hrnet_w18_small", "regnetx_002", "regnety_002", "repvgg_a0", "mobilenetv2_050", "mnasnet_050", "ghostnet_050"),
    *("tinynet_e", "lcnet_050", "mixnet_s", "rexnet_100", "mobileone_s0", "selecsls42", "inception_next_atto"),
    *("convnextv2_atto", "convnext_atto", "nf_resnet26", "edgenext_xx_small", "mobilevit_xxs", "poolformer_s12"),
    *("fastvit_t8", "starnet_s1", "repghostnet_050", "deit_tiny_patch16_224", "mixer_s32_224", "resmlp_12_224"),
    *("cspdarknet53", "ghostnet_100", "inception_next_tiny", "swin_tiny_patch4_window7_224"),
)
SMOLLM = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
PYTHIA = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
CLASSES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "BertModel": ("BertConfig", {}, "text"),
    "RobertaModel": ("RobertaConfig", {}, "text"),
    "DistilBertModel": ("DistilBertConfig", {}, "text"),
    "MPNetModel": ("MPNetConfig", {}, "text"),
    "GPT2LMHeadModel": ("GPT2Config", {}, "text"),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", PYTHIA, "text"),
    "OPTForCausalLM": ("OPTConfig", {}, "text"),
    "LlamaForCausalLM": ("LlamaConfig", {**SMOLLM, "intermediate_size": 1536, "vocab_size": 49152}, "text"),
    "T5EncoderModel": ("T5Config", {}, "text"),
    "ViTModel": ("ViTConfig", {}, "images"),
    "CLIPVisionModel": ("CLIPVisionConfig", {}, "images"),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {}, "images"),
}
"""Of transformers: configuration, its settings, and what goes in."""
TOKENS, IMAGE = 128, 224
RESULTS = Path(__file__).parent / "results"
SAMPLES = 2
MOST = 0.9
OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool"),
    *("_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align", "deform_conv2d"),
    "_deform_conv2d_backward",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*NAMES, *CLASSES])
    parser.add_argument("--stub", action="store_true", help="torchvision's compiled part does not fit this torch")
    args = parser.parse_args()
    path = RESULTS / "zoo.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in args.names:  # a process each: peaks of memory are a process's
        if name in kept:
            continue
        load = os.getloadavg()[0]
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            kept[name] = {**pool.submit(measured, name, args.stub).result(), "load": load}
        path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(row(name, kept[name]), flush=True)
    (RESULTS / "zoo.md").write_text(table(kept))


def table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows, the models that have most to prune first."""
    rows = sorted(kept, key=lambda name: (-kept[name].get("share", -1.0), name))
    found = sum(bool(kept[name].get("groups")) for name in rows)
    most = sum(kept[name].get("share", 0.0) >= MOST for name in rows)
    said = (
        f"{len(rows)} models of timm and transformers; {found} have groups, in {most} of them {MOST:.0%} of the MACs "
        "or more shrink."
    )
    head = "| model | parameters, M | groups | MACs that can be pruned | why not the rest | processor s | passes | GB |"
    lines = [head, "|---|---|---|---|---|---|---|---|", *(row(name, kept[name]) for name in rows)]
    return "\n".join([said, "Written by `python -m benchmarks.zoo`; seconds on a shared machine.", "", *lines, ""])


def row(name: str, r: Mapping[str, Any]) -> str:
    """A line of the table."""
    if "error" in r:
        return f"| {name} | | | | {r['error']} | | | |"
    counts = f"{r['parameters'] / 1e6:.1f} | {r['groups']} | {r['share']:.0%} | {r['rest']}"
    return f"| {name} | {counts} | {r['seconds']:.1f} | {r['passes']} | {r['peak_gb']:.1f} |"


def measured(name: str, stub: bool) -> Mapping[str, Any]:
    """`measure`, or the error that came instead."""
    try:
        return measure(name, stub)
    except (InputError, RuntimeError) as error:
        return {"error": one_line(error)}


def measure(name: str, stub: bool) -> Mapping[str, Any]:
    """One row: what `analyze` finds in a model, on images of the size that timm names for it or on short texts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = of_transformers(name) if name in CLASSES else of_timm(name, stub)
    found = analysed(model.eval(), inputs)
    structure, factor = found.structure, 1 if sys.platform == "darwin" else 1024
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": sum(g.kind != "block" for g in structure),
        "share": prunable_share(structure),
        "rest": most_said(structure),
        "seconds": found.seconds,
        "passes": found.passes,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor / 1e9,
    }


def of_timm(name: str, stub: bool) -> tuple[Any, Any]:
    """A model of timm, and images of its size."""
    kept = stub_operators() if stub else None  # noqa: F841  # timm is imported behind it
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, (torch.randn(SAMPLES, *model.default_cfg["input_size"]),)


def of_transformers(name: str) -> tuple[Any, Any]:
    """A class of transformers, and sentences or images for it."""
    import transformers

    config, settings, kind = CLASSES[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    if kind == "images":
        return model, (torch.randn(SAMPLES, 3, IMAGE, IMAGE),)
    ids = torch.randint(3, 1000, (SAMPLES, TOKENS))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prunable_share(structure: Structure) -> float:
    """Share of the MACs that lies in operations which shrink with a group, blocks apart."""
    sizes = {spec.name: prod(spec.shape) for op in structure.ops for spec in op.tensors}
    macs = {op.name: op.positions * (1 if op.weight is None else sizes[op.weight]) for op in structure.ops}
    narrowed = {g.name for g in structure if g.kind != "block"}
    return sum(macs[op.name] for op in structure.ops if narrowed & {*op.groups}) / sum(macs.values())


def most_said(structure: Structure) -> str:
    """The reason that most frozen modules have, without what differs from one to the next."""
    first = Counter(reason.split(": ")[-1].split("; ")[0].split(" (")[0] for reason in structure.frozen.values())
    return first.most_common(1)[0][0] if first else ""


def stub_operators() -> torch.library.Library:
    """Declare what torchvision's Python asks for where its compiled part does not fit this torch; keep the result."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor x) -> Tensor")
    return library


if __name__ == "__main__":
    main()
