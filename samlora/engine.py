"""Processes and devices that share one job: one, several GPUs, several machines. Training and prediction use it."""

import os

import torch

from samlora.device import pick_device, pick_precision
from samlora.errors import InputError

FABRIC_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


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
    fabric = Fabric(
        accelerator=chosen.type,
        devices=count,
        num_nodes=nodes,
        strategy=strategy,
        precision=FABRIC_PRECISION[precision],
    )
    fabric.launch()
    return fabric, precision
