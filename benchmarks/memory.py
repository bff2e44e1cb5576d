"""Peak memory of a training step: samlora against stock segment_anything, at several batches.

The steps are those of step.py (512 px, LoRA of rank 4, eight classes). Each row is a fresh process that takes two
steps; its peak is the largest resident size, or what the GPU's allocator held. A killed process is recorded as such.

    python benchmarks/memory.py [--device cuda]       (needs 20 GB of free memory; ten minutes)

Writes benchmarks/results/memory.json.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence

import torch
from step import BASELINE, CLASSES, VARIANTS, make_step
from timing import heading, options, timed, write_record

from samlora.allocator import keep_freed_memory
from samlora.device import peak_memory

SIZE = 512
# (encoder, batch, variant); 12 is the batch that the target names.
ROWS = (
    *(("vit_b", 2, name) for name in VARIANTS),
    *(("vit_b", 12, name) for name in (BASELINE, "samlora fp32", "samlora bf16", "samlora bf16 checkpointing")),
    ("vit_h", 1, "samlora bf16 checkpointing"),
)


def in_a_process(encoder: str, batch: int, name: str, size: int, device: torch.device) -> dict:
    """What `peak_of` finds in a fresh process, or {"exit_code"} where that did not live to the end."""
    options_ = {"--encoder": encoder, "--batch": batch, "--size": size, "--device": device, "--peak-of": name}
    flags = [str(part) for pair in options_.items() for part in pair]
    answer = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1]) if answer.returncode == 0 else {"exit_code": answer.returncode}


def peak_of(encoder: str, batch: int, name: str, size: int, device: torch.device) -> dict:
    """Bytes at the peak of two steps of this process, and seconds of the second."""
    keep_freed_memory(name != BASELINE)  # as each runs in its own program
    step = make_step(name, encoder, size, batch, device)
    release_memory()  # stock was copied from a model that is gone by now
    step()
    seconds, _ = timed(step)
    return {"bytes": peak_memory(device), "seconds_of_second_step": round(seconds, 2)}


def release_memory() -> None:
    """Gives what the allocator holds without need back to the system, where the C library can (Linux)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def compare(rows: Sequence[tuple[str, int, str]], size: int, device: torch.device) -> list[dict]:
    """The peaks of `rows`, beside each that of stock for the same encoder and batch, where it is among them."""
    found = []
    for encoder, batch, name in rows:
        found.append(
            {"encoder": encoder, "batch": batch, "name": name} | in_a_process(encoder, batch, name, size, device)
        )
        print(found[-1], flush=True)
    stock = {
        (row["encoder"], row["batch"]): row["bytes"] for row in found if row["name"] == BASELINE and "bytes" in row
    }
    for row in found:
        base = stock.get((row["encoder"], row["batch"]))
        if base and "bytes" in row:
            row["by_stock"] = round(row["bytes"] / base, 3)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--rows", type=int, default=len(ROWS), help="take only as many, from the first")
    parser.add_argument("--peak-of", choices=VARIANTS, help="only print the peak of this variant, in this process")
    parser.add_argument("--encoder", default="vit_b", help="of --peak-of")
    parser.add_argument("--batch", type=int, default=2, help="of --peak-of")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if args.peak_of:
        print(json.dumps(peak_of(args.encoder, args.batch, args.peak_of, args.size, device)))
        return
    config = {"size": args.size, "rank": 4, "classes": CLASSES, "threads": torch.get_num_threads()}
    what = "bytes at the peak of two training steps, each row in a process of its own"
    record = heading(what, device, config, kept=True)
    # A child's peak is never below its parent's at the time of starting it: this process stays small.
    record["rows"] = compare(ROWS[: args.rows], args.size, device)
    write_record(record, args.output)


if __name__ == "__main__":
    main()
