"""Batches as they come from disk: files that cannot be read, and processes that die."""

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from samlora.data.chunks import ChunkDataset
from samlora.data.dataset import Batches, Sample, SliceDataset, SliceFile
from samlora.data.ignored import split_ignored
from samlora.data.patches import PatchDataset
from samlora.engine import gathered
from samlora.errors import InputError
from samlora.model.checkpoint import Spec
from samlora.training.stop import SIGNALS

Slices = SliceDataset | ChunkDataset | PatchDataset


@dataclass(frozen=True)
class Read:
    """A sample, or those of a chunk, and what could not be read on the way: (path, why). Without any nothing could."""

    samples: tuple[Sample, ...]
    problems: tuple[tuple[str, str], ...] = ()


class Reader:
    """A data set whose unreadable files are reported, not raised: a raise loses its line in a worker process.

    skip: a slice that cannot be read is replaced by the next of the data set that can, in this epoch's transform.
    """

    def __init__(self, dataset: Slices, skip: bool):
        self.dataset, self.skip = dataset, skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Read:
        epoch, index = key
        problems = []
        for offset in range(len(self) if self.skip else 1):
            at = (index + offset) % len(self)
            try:
                found = self.dataset[epoch, at]
                return Read((found,) if isinstance(found, Sample) else tuple(found), tuple(problems))
            except InputError as error:
                problems.append((str(self.dataset.slices[at].path), str(error)))
        return Read((), tuple(problems))


class BadSamples:
    """Files that could not be read: stops at the first, or counts how often each had to be done without.

    counts: over all processes of a run, up to the last `share`.
    """

    def __init__(self, skip: bool, say: Callable[[str], None]):
        self.skip, self.say = skip, say
        self.counts: dict[str, int] = {}
        self._said: set[str] = set()
        self._met: list[tuple[str, str]] = []  # since the last `share`

    def met(self, path: str, problem: str) -> None:
        """Raises InputError, or takes note of it."""
        if not self.skip:
            raise InputError(f"{problem}; put the file right and --resume, or leave it out with --on_bad_sample skip")
        self._met.append((path, problem))

    def share(self, fabric) -> None:
        """Counts what any process has met, and warns once for each file; all processes call this."""
        if not self.skip:
            return
        for path, problem in sum(gathered(fabric, self._met), []):
            if path not in self._said:
                self._said.add(path)
                self.say(f"warning: left out: {problem}")
            self.counts[path] = self.counts.get(path, 0) + 1
        self._met = []

    def readable(self, slices: Iterable[SliceFile]) -> Iterator[tuple]:
        """(image, label) of each slice that can be read."""
        for item in slices:
            try:
                yield item.read()
            except InputError as error:
                self.met(str(item.path), str(error))


def read_batches(
    dataset: Slices, batches: Batches, workers: int, bad: BadSamples, spec: Spec
) -> Iterator[list[Sample]]:
    """Lists of samples, read by worker processes in the order of `batches`; closing the generator ends these.

    Raises InputError for a file that cannot be read or holds other labels than those of `spec`, 0..num_classes.
    """
    loader = torch.utils.data.DataLoader(
        Reader(dataset, bad.skip),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # the loader draws a number at its start; not from the run's random numbers
    )
    iterator = iter(loader)
    try:
        for batch in iterator:
            samples = []
            for read in batch:
                for path, problem in read.problems:
                    bad.met(path, problem)
                if not read.samples:
                    raise InputError(
                        f"{Path(read.problems[0][0]).parent}: no slice in it can be read; prepare it again"
                    )
                for sample in read.samples:
                    if split_ignored(sample.label, spec.recipe)[0].max() > spec.num_classes:
                        raise InputError(
                            f"{sample.name}: its labels went beyond 0..{spec.num_classes} during training; "
                            "prepare it again"
                        )
                samples += read.samples
            yield samples
    finally:
        if workers:
            _end_workers(iterator)


def worker_died(error: RuntimeError, workers: int) -> InputError | None:
    """What to tell the user when `error` is PyTorch's report of a dead worker process, else None."""
    if "DataLoader worker" not in str(error):
        return None
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"--num_workers {workers}: a process that reads slices died ({reason}); most often memory ran out: give more "
        f"(in Docker --shm-size), or fewer workers, or --num_workers 0, and --resume"
    )


def _as_list(samples: list[Read]) -> list[Read]:
    return samples  # samples differ in size and are resized on the device


def _end_workers(iterator: Iterator) -> None:
    """Ends the worker processes of a DataLoader's iterator for certain.

    Left to the end of the process they would keep it for ever: Python then asks them by SIGTERM, which they ignore, and
    waits. PyTorch has no public way; its own one goes first, as it also stops reporting their ends as failures.
    """
    try:
        iterator._shutdown_workers()
    finally:
        for worker in iterator._workers:
            worker.kill()


def _ignore_signals(_worker: int) -> None:
    for number in SIGNALS:  # these reach every process of a group; the first one decides when to end the others
        signal.signal(number, signal.SIG_IGN)
