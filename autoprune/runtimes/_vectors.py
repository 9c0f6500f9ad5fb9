"""How many channels the widest vectors of this processor hold: blocked layouts of convolutions come in so many."""

from __future__ import annotations

import torch

FLOATS = {"AVX512": 16, "AVX2": 8}
"""Numbers of float32 in a vector; on other processors nobody has measured what it comes to."""


def floats_a_vector() -> int:
    """16 with AVX-512, 8 with AVX2, else 1."""
    return FLOATS.get(torch.backends.cpu.get_cpu_capability(), 1)
