"""Memory of a long-lived evaluator: kernels and blocks that stay bounded, and smaller batches where it runs out."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autoprune.errors import one_line
from autoprune.structure import Structure

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
SHARE, GPU_SHARE, FEWEST = 8, 32, 8
"""Of the evaluator's memory, and of a GPU's, what the operands of one call may take; never fewer samples than these."""
_NO_MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory"),
    *("unable to find an engine", "STATUS_ALLOC_FAILED"),  # cuDNN without room for its workspace (pytorch #108645)
)


class NoRoomError(RuntimeError):
    """Memory ran out and nothing could be made smaller."""


def with_room(attempt: Callable[[], T], make_room: Callable[[], bool]) -> T:
    """What `attempt` returns; each time that it runs out of memory, `make_room` makes it smaller for one more attempt.

    Raises:
        NoRoomError: memory ran out and `make_room` said that there is nothing left to make smaller.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = one_line(error)
        if not make_room():  # out of the handler, which holds the frames and with them their tensors
            raise NoRoomError(f"the smallest batch does not fit in memory: {said}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trim_heap()


def samples_at_once(forward: Callable[[], object], samples: int, memory: int, device: torch.device) -> tuple[int, int]:
    """How many samples may go through a model together, and in training; `forward` runs it on `samples` of them.

    So many that the tensors that the largest call reads and writes fit into an eighth of `memory`: what is alive at a
    time is about twice as much. In training all that calls return is alive; half of the memory is for that. Multiples
    of 8 and 4, and no fewer.
    """
    room, training = memory // SHARE, memory // 2
    if device.type == "cuda":
        there = int(torch.cuda.get_device_properties(device).total_memory)
        room, training = there // GPU_SHARE, there // 4
    with torch.no_grad(), _Largest() as seen:
        forward()
    few = FEWEST // 2
    fits: int = room * samples // max(1, seen.bytes) // FEWEST * FEWEST
    trains: int = training * samples // max(1, seen.returned) // few * few
    return max(FEWEST, fits), max(few, trains)


class _Largest(TorchFunctionMode):
    """Bytes of the tensors of the largest call, parameters apart, and of all that calls return."""

    bytes = returned = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {id(t): t for t in tree_leaves((args, kwargs, out)) if type(t) is Tensor}
        self.bytes = max(self.bytes, sum(t.numel() * t.element_size() for t in held.values()))
        self.returned += sum(t.numel() * t.element_size() for t in tree_leaves(out) if type(t) is Tensor)
        return out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU's allocator had no memory left; the latter and cuDNN say so in words only."""
    if isinstance(error, NoRoomError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def bound_kernel_cache(structure: Structure) -> None:
    """Let oneDNN keep the kernels of a few candidates instead of 1 024: every width brings new ones, some MB in all.

    It reads the variable once, at its first use in a process; a user's own setting stays.
    """
    weighted = sum(op.weight is not None for op in structure.ops)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(max(128, 4 * weighted)))


def trim_heap() -> None:
    """Give back what glibc holds in fragments: candidates of ever new widths leave a few MB each hundred."""
    with suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_blocks() -> None:
    """Let glibc serve blocks up to 64 MB from its heap, where they stay mapped; by default half of that is the most.

    Activations of the statistics batch are of that size, and mapping them anew costs a tenth of a refit. All threads
    take from one heap: those that go in lock step would keep one each.
    """
    with suppress(OSError, AttributeError):  # another C library: nothing is lost but speed
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_ARENA_MAX, 1)
