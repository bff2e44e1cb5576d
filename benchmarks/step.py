"""A training step (forward, SAMed's loss, backward, AdamW): samlora against stock segment_anything.

ViT-B, 512 px, LoRA of rank 4, eight classes, the same random weights and images. In fp32 the losses of two steps must
agree to 1e-5 before anything is timed; how far bfloat16 moves them is recorded. memory.py takes the peak memory.

    python benchmarks/step.py [--batch 2] [--device cuda]       (CPU: an hour; with --batch 2 ten minutes)

Writes benchmarks/results/step.json.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence

import torch
from plain import dice_ce as plain_loss
from plain import plain_copy, random_system
from timing import KEPT, Products, heading, interleave, options, ratios, write_record
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from samlora.model.variants import VARIANTS as ENCODERS
from samlora.training.config import TrainConfig
from samlora.training.losses import dice_ce
from samlora.training.setup import make_optimizer

BASELINE = "stock fp32"
CHECKPOINTING = ("samlora fp32 checkpointing", "samlora bf16 checkpointing")
VARIANTS = (BASELINE, "samlora fp32", "samlora bf16", *CHECKPOINTING)
GPU_VARIANTS = (*VARIANTS, "stock amp tf32 compiled", "samlora bf16 compiled")
CLASSES = 8


def make_step(name: str, variant: str, size: int, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """A function that takes one step of the variant `name` on the same images every time, and returns the loss."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(batch, 1, size, size, generator=generator).expand(-1, 3, -1, -1).to(device)
    labels = torch.randint(CLASSES + 1, (batch, size // 4, size // 4), generator=generator).to(device)
    ours = random_system(variant, size, CLASSES)
    stock = name.startswith("stock")
    model = (plain_copy(ours) if stock else ours).to(device).train()
    model.image_encoder.checkpointing = "checkpointing" in name  # stock has no such switch and no name that asks for it
    if stock:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1)
    else:
        optimizer = make_optimizer(TrainConfig(base_lr=1e-4), model, device)
    low_precision = "bf16" in name or "amp" in name
    forward = torch.compile(model) if "compiled" in name else model

    def step() -> Tensor:
        if device.type == "cuda":  # one setting for the whole process, so each step sets its own
            torch.set_float32_matmul_precision("high" if "tf32" in name else "highest")
            torch.backends.cudnn.allow_tf32 = "tf32" in name
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            outputs = forward(images)
        loss = plain_loss(outputs[0].float(), labels) if stock else dice_ce(outputs, labels)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure(
    variant: str, size: int, batch: int, repeats: int, device: torch.device, without: Collection[str] = ()
) -> dict:
    """Seconds of every variant's step; raises AssertionError unless the fp32 losses of two steps agree to 1e-5."""
    names = [name for name in (GPU_VARIANTS if device.type == "cuda" else VARIANTS) if name not in without]
    steps = {name: make_step(name, variant, size, batch, device) for name in names}
    losses, operations = {name: [step().item()] for name, step in steps.items()}, {}
    for name, step in steps.items():
        counts = name in VARIANTS  # what is compiled cannot be counted
        with FlopCounterMode(display=False) if counts else contextlib.nullcontext() as counter:
            losses[name].append(step().item())
        if counts:
            operations[name] = counter.get_total_flops()
    for name in {"samlora fp32", "samlora fp32 checkpointing"} & set(names):
        torch.testing.assert_close(losses[name], losses[BASELINE], atol=1e-5, rtol=0)
    products = Products(device, batch * (size // ENCODERS[variant].stride) ** 2, ENCODERS[variant].width)
    variants, stock = steps | {KEPT: steps[BASELINE]}, [name for name in names if name.startswith("stock")]
    seconds = interleave(variants, repeats, warm_up=0, between=products, published=stock)  # two steps were taken above
    return {
        "losses_of_two_steps": losses,
        "operations": operations,
        "product_operations_per_second": products.rates(),
        "seconds": seconds,
        "times_as_fast_as_stock_fp32": ratios(seconds, BASELINE),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "step")
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--without", nargs="+", default=[], choices=VARIANTS[1:], help="variants to leave out")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    size = args.variant, args.size, args.batch
    config = {name: getattr(args, name) for name in ("variant", "size", "batch", "repeats")}
    config |= {"rank": 4, "classes": CLASSES, "threads": torch.get_num_threads()}
    what = "seconds of a training step, variants in turn in one process; fp32 losses equal to 1e-5 (asserted)"
    record = heading(what, device, config, kept=True)
    record |= measure(*size, args.repeats, device, args.without)
    write_record(record, args.output)
    for name, times in record["seconds"].items():
        ratio = record["times_as_fast_as_stock_fp32"].get(name, {"median": 1.0})
        print(f"{name}: {times['median']:.3f} s, {ratio['median']} times as fast as stock fp32")


if __name__ == "__main__":
    main()
