"""The same work on many items, shared among processes and machines."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import datetime
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from samlora.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 8  # a case of 512 x 512 x 200 takes about 1 GB while it is worked on


def worker_count(workers: int | None, items: int) -> int:
    """The processes to use for so many items: `workers`, or else one per core and 8 at most.

    Processes that torchrun started on this machine divide its cores among themselves. Raises InputError for fewer
    than one.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: a number of processes, at least 1, is needed")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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


@dataclass(frozen=True)
class Team:
    """The processes that were started for one command, on one or several machines: which this is, and how many."""

    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that are this process's to do."""
        return items[self.rank :: self.count]

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` returns in each process, in their order, when all are done.

        An InputError that one meets is raised in all, so that none waits for it.
        """
        if self.count == 1:
            return [work()]
        import torch.distributed as dist

        problem = result = None
        try:
            result = work()
        except InputError as error:
            problem = str(error)
        everything: list = [None] * self.count
        dist.all_gather_object(everything, (problem, result))
        for met, _ in everything:
            if met is not None:
                raise InputError(met)
        return [found for _, found in everything]

    def first(self, work: Callable[[], object]) -> None:
        """Does `work` in the first process, while the others wait."""
        self.gather(lambda: work() if self.rank == 0 else None)


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """The team that RANK and WORLD_SIZE in the environment tell of (torchrun sets them); without them, of one.

    The processes of a team must all come here. Raises InputError where they cannot find one another.
    """
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdigit() and count.isdigit()) or int(count) == 1:
        yield Team()
        return
    import torch.distributed as dist

    joins = not dist.is_initialized()
    if joins:
        try:
            # Shares of the work may differ by hours.
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"RANK {rank} and WORLD_SIZE {count} are set, but the processes cannot be joined ({reason}); "
                "start them with torchrun, or unset both"
            ) from None
    try:
        yield Team(int(rank), int(count))
    finally:
        if joins:
            dist.destroy_process_group()
