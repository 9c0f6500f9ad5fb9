"""What is found in the models that people use, one row a model of timm: random weights, noise for images, one thread.

usage: OMP_NUM_THREADS=1 python -m benchmarks.zoo [resnet18 vgg16 ...]   [--stub]   (needs timm and torchvision)
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from math import prod
from multiprocessing import get_context
from typing import Any

import torch

from autoprune.structure import Structure
from autoprune.tracing.analyze import analyzed

NAMES = (
    *("resnet18", "resnet50", "densenet121", "vgg16", "mobilenetv3_large_100", "efficientnet_b0", "convnext_tiny"),
    "vit_small_patch16_224",
)
SAMPLES = 2
OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool"),
    *("_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align", "deform_conv2d"),
    "_deform_conv2d_backward",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--stub", action="store_true", help="torchvision's compiled part does not fit this torch")
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}\n\n| model | parameters, M | groups | MACs that can be pruned ", end="")
    print("| why not the rest | processor s | passes | peak memory, GB |\n|---|---|---|---|---|---|---|---|")
    for name in args.names:  # a process each: peaks of memory are a process's
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            r = pool.submit(measure, name, args.stub).result()
        counts = f"{r['parameters'] / 1e6:.1f} | {r['groups']} | {r['share']:.0%} | {r['rest']}"
        print(f"| {name} | {counts} | {r['seconds']:.1f} | {r['passes']} | {r['peak_gb']:.1f} |", flush=True)


def measure(name: str, stub: bool) -> Mapping[str, Any]:
    """One row: what `analyze` finds in a model of timm on images of the size that timm names for it."""
    kept = stub_operators() if stub else None  # noqa: F841  # timm is imported behind it
    import timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    found = analyzed(model, (torch.randn(SAMPLES, *model.default_cfg["input_size"]),))
    structure, factor = found.structure, 1 if sys.platform == "darwin" else 1024
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(structure),
        "share": prunable_share(structure),
        "rest": most_said(structure),
        "seconds": found.seconds,
        "passes": found.passes,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor / 1e9,
    }


def prunable_share(structure: Structure) -> float:
    """Share of the MACs that lies in operations which shrink with a group."""
    sizes = {spec.name: prod(spec.shape) for op in structure.ops for spec in op.tensors}
    macs = {op.name: op.positions * (1 if op.weight is None else sizes[op.weight]) for op in structure.ops}
    return sum(macs[op.name] for op in structure.ops if op.groups) / sum(macs.values())


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
