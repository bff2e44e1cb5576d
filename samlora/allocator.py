"""What the C library does with memory that was freed."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # glibc's malloc.h
_MOST = 2**31 - 1


def keep_freed_memory(keep: bool = True) -> bool:
    """Lets glibc keep what is freed for the next that is asked for; returns whether this can be done here.

    By default blocks above 32 MiB go back to the system at once, and each new one is cleared page by page: a third to
    a half of the time of a forward pass on a CPU, where every layer asks for such blocks (benchmarks/encoder.py). Kept,
    the memory of the process stays at its highest until it ends. This concerns the whole process, so the commands do
    it, and `import samlora` does not. keep: False gives back what is kept, and is glibc's default as it becomes after a
    while of running.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):  # another system, or another C library
        return False
    if keep:
        wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _MOST, _ARENA_MAX: 1}  # one arena: threads share what is kept
    else:
        wanted = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
        library.malloc_trim(0)
    return all([library.mallopt(name, value) for name, value in wanted.items()])
