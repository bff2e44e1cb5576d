"""What every benchmark does alike: variants timed in turn in one process, and the record that is written."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from samlora.allocator import keep_freed_memory
from samlora.files import whole
from samlora.training.run import commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEPT = "stock fp32, freed memory kept"
PACKAGES = ("samlora", "torch", "segment-anything", "MedPy", "numpy", "scipy")


def timed(function: Callable, *arguments: object) -> tuple[float, object]:
    """Seconds and result of one call; a GPU's queue is empty before, and what the call put into it is waited for.

    On a GPU the time is that between two events, the second of which follows all that the call put into the queue.
    """
    if not torch.cuda.is_initialized():
        began = time.perf_counter()
        result = function(*arguments)
        return time.perf_counter() - began, result
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    result = function(*arguments)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, result


def interleave(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    between: Callable[[], object] | None = None,
    published: Collection[str] = (),
) -> dict[str, dict]:
    """Seconds of each variant, called in turn `repeats` times after `warm_up` rounds that do not count.

    between: called before each variant, outside its time. published: variants that run as other programs do, which
    leave the C library's treatment of freed memory as it is (samlora.allocator); the rest run as samlora's commands.
    Each begins without what the one before it left, as in a process of its own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm_up + repeats):
        for name, function in variants.items():
            if between is not None:
                between()
            keep_freed_memory(False)
            if name not in published:
                keep_freed_memory()
                function()  # outside its time: a command has its memory after the first batch
            took, _ = timed(function)
            if turn >= warm_up:
                seconds[name].append(took)
    return {name: figures(times) for name, times in seconds.items()}


def figures(times: Sequence[float]) -> dict[str, float | int]:
    """Shortest and median time, and how many there were."""
    return {"min": min(times), "median": statistics.median(times), "repeats": len(times)}


def ratios(seconds: Mapping[str, dict], baseline: str) -> dict[str, dict[str, float]]:
    """How many times as fast as `baseline` every other variant is: by medians, and by shortest times."""
    return {
        name: {kind: round(seconds[baseline][kind] / times[kind], 2) for kind in ("median", "min")}
        for name, times in seconds.items()
        if name != baseline
    }


class Products:
    """The largest product of a block of the encoder, rows x width by width x 4 width, and the best rate it was made at.

    A busy machine slows it as it slows what is measured, so it is called in turn with the variants.
    """

    def __init__(self, device: torch.device, rows: int, width: int):
        self.operations = 2 * rows * width * 4 * width
        self.factors = {
            name: [torch.randn(shape, device=device).to(dtype) for shape in ((rows, width), (width, 4 * width))]
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        self.best = dict.fromkeys(self.factors, float("inf"))

    def __call__(self) -> None:
        for name, factors in self.factors.items():
            self.best[name] = min([self.best[name], *(timed(torch.matmul, *factors)[0] for _ in range(5))])

    def rates(self) -> dict[str, float]:
        """Operations per second by number format."""
        return {name: self.operations / seconds for name, seconds in self.best.items()}


def device_text(device: torch.device) -> str:
    """The processor and what of it was used, or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, process bound to {cores} core{'s' if cores > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def options(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with what every script takes: --output."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return parser


def heading(
    what: str,
    device: torch.device,
    config: Mapping[str, object],
    packages: Sequence[str] = PACKAGES,
    kept: bool = False,
) -> dict:
    """The beginning of a record: what, where, with which versions, commit and options. Call it before measuring.

    kept: whether variants run with freed memory as their programs have it, as `interleave` does it.
    """
    return {
        "what": what,
        "device": device_text(device),
        "load_at_start": os.getloadavg()[0],
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "commit": commit(),
        "config": dict(config),
    } | ({"freed_memory": "kept by samlora, given back by published code"} if kept else {})


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # samlora run from a source tree that was not installed
        return "not installed"


def write_record(record: Mapping[str, object], path: Path) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
