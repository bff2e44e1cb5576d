"""Devices and number formats: chosen, named, measured."""

import sys
from pathlib import Path

import torch

from samlora.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device for auto, cpu, cuda or mps. Raises InputError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there[name]:
        raise InputError(
            f"--device {name}: there is none here; available: {', '.join(k for k, v in there.items() if v)}"
        )
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 for auto: half precision where the device multiplies it in hardware.

    Raises InputError for fp16 on a CPU, where there is neither speed nor loss scaling.
    """
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 is for GPUs; on a CPU use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if device.type == "cpu" and _fast_bf16() else "fp32"


def exact_float32() -> None:
    """Lets a GPU compute convolutions of float32 in float32: cuDNN takes TF32 unless it is told otherwise.

    PyTorch's matrix products of float32 are in float32 already. For commands: the switch is one for the whole process,
    and a library leaves it alone.
    """
    torch.backends.cudnn.allow_tf32 = False


def _fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch we take
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def device_name(device: torch.device) -> str:
    """A name a person knows the device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        model = "CPU"
        info = Path("/proc/cpuinfo")
        if info.exists():
            model = next(
                (
                    line.split(":")[1].strip()
                    for line in info.read_text(encoding="utf-8").splitlines()
                    if "model name" in line
                ),
                model,
            )
        return f"{model}, {torch.get_num_threads()} threads"
    return device.type


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator on CUDA, else the largest resident size of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # kilobytes everywhere but on macOS
