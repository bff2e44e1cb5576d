"""Processes and devices that share one job: one, several GPUs, several machines. Training and prediction use it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from samlora.device import exact_float32, pick_device, pick_precision
from samlora.errors import InputError

FABRIC_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

Value = TypeVar("Value")


def launch(device: str, precision: str, count: int, nodes: int, strategy: str):
    """Lightning Fabric, launched, and the name of the precision.

    device, precision: as `samlora.device.pick_device` and `pick_precision` take them. count: devices on this machine.
    strategy: "ddp" for a process per device; "dp" for one process; "auto" is dp where count > 1.
    Under torchrun its processes are taken as they are, whatever count and nodes say.
    Raises InputError for devices that are not there or cannot be used together.
    """
    from lightning_fabric import Fabric

    chosen = pick_device(device)
    if "LOCAL_WORLD_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        count, strategy = int(os.environ["LOCAL_WORLD_SIZE"]), "ddp"
        nodes = int(os.environ["WORLD_SIZE"]) // count
    elif count > 1 and strategy == "auto":
        strategy = "dp"
    if chosen.type == "cuda" and count > torch.cuda.device_count():
        raise InputError(f"--n_gpu {count}: there are {torch.cuda.device_count()} GPUs here; give that many or fewer")
    if strategy == "dp" and chosen.type != "cuda":
        raise InputError(
            f"--n_gpu {count}: data parallelism in one process needs GPUs; use --strategy ddp on {chosen.type}"
        )
    precision = pick_precision(precision, chosen)
    exact_float32()
    fabric = Fabric(
        accelerator=chosen.type,
        devices=count,
        num_nodes=nodes,
        strategy=strategy,
        precision=FABRIC_PRECISION[precision],
    )
    fabric.launch()
    return fabric, precision


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> Tensor:
        # Every process makes the same loss of the sum, so their gradients add up to this one times their number.
        return gradient * dist.get_world_size()


def sum_over_processes(part: Tensor) -> Tensor:
    """The sum of a tensor over all processes of a run, which all call this.

    Where all make the same loss of it, the gradients of the parameters, averaged over the processes as DDP does, are
    those of that loss in one process.
    """
    return _Sum.apply(part)


def gathered(fabric, value: Value) -> list[Value]:
    """The values of all processes, in their order, but for false ones (None, empty); all processes call this.

    Where all are false, one number each is exchanged, and where there is one process, nothing.
    """
    if fabric.world_size == 1:
        return [value] if value else []
    if not fabric.all_reduce(torch.tensor(float(bool(value)), device=fabric.device), reduce_op="max"):
        return []
    values = [None] * fabric.world_size
    dist.all_gather_object(values, value)
    return [value for value in values if value]


def shared_on_disk(fabric, make: Callable[[], Value]) -> Value:
    """What `make` returns: made by one process of each machine, which leaves it on disk, then found there by the rest.

    All processes call this. Raises InputError in all where it is raised in one.
    """
    made = None
    with together(fabric):
        if fabric.local_rank == 0:
            made = make()
    return make() if made is None else made


@contextlib.contextmanager
def together(fabric) -> Iterator[None]:
    """An InputError that one process meets in this block is raised in all, at its end: nobody waits for one that ended.

    All processes run the block, and nothing in it may wait for another process.
    """
    if fabric.world_size == 1:
        yield
        return
    problem = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    if problems := gathered(fabric, problem):
        raise InputError(problems[0])
