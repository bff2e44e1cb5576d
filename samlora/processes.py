"""The same work on many items, shared among processes."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from samlora.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 8  # a case of 512 x 512 x 200 takes about 1 GB while it is worked on


def worker_count(workers: int | None, items: int) -> int:
    """The processes to use for so many items: `workers`, or else one per core and 8 at most.

    Raises InputError for fewer than one.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: a number of processes, at least 1, is needed")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(workers or min(cores, _MOST_WORKERS), items))


def each(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, title: str, unit: str = "case"
) -> list[Result]:
    """The results of `function` on `items`, in order, with a progress bar; the first error ends it.

    With more than one worker `function` and items must be importable in another process (spawn), and a script that
    gets here needs `if __name__ == "__main__":`. Raises InputError where a process dies.
    """
    from tqdm import tqdm

    if not items:
        return []
    if workers == 1:
        return [function(item) for item in tqdm(items, title, unit=unit, disable=None)]
    # spawn: safe on every system, and with libraries that hold threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(items)), context) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in tqdm(concurrent.futures.as_completed(futures), title, len(futures), unit=unit, disable=None):
                future.result()
        except concurrent.futures.process.BrokenProcessPool:
            advice = "a process died, perhaps of too little memory; use fewer"
            raise InputError(f"--workers {workers}: {advice}") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
