"""How the C library treats freed memory: on a CPU, large tensors are otherwise mapped anew at every use."""

import ctypes
import ctypes.util


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """
    Have glibc keep memory that tensors give back, in pieces of up to 1 GiB, for the rest of the process.

    By default each large tensor gets fresh pages that the kernel clears one by one, which takes up to a third of an
    update on a CPU with a large vocabulary.

    Returns:
        `bool`: whether the C library was told; other libraries than glibc have no such setting.
    """
    library = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(library), "mallopt", None) if library else None
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
