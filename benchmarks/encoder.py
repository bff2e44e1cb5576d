"""The image encoder's forward pass on a batch of slices: samlora against stock segment_anything.

Both carry LoRA of rank 4 with the same random weights: stock as SAMed's _LoRA_qkv, ours merged as `samlora predict`
merges it. fp32 embeddings must agree to 1e-4; how far bfloat16 moves them is recorded.

    python benchmarks/encoder.py [--batch 4] [--device cuda]       (CPU: four minutes)

Writes benchmarks/results/encoder.json.
"""

from collections.abc import Sequence

import torch
from plain import plain_copy, random_system
from timing import KEPT, Products, heading, interleave, options, ratios, write_record
from torch.utils.flop_counter import FlopCounterMode

import samlora
from samlora.model.variants import VARIANTS

BASELINE = "stock fp32"


def measure(variant: str, size: int, batch: int, repeats: int, device: torch.device) -> dict:
    """Seconds of every variant on the same images; raises AssertionError unless fp32 embeddings agree to 1e-4."""
    model = random_system(variant, size, num_classes=8)
    stock = plain_copy(model).image_encoder.to(device).eval()
    ours = samlora.merge(model).image_encoder.to(device).eval()
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(2)).to(device)

    @torch.inference_mode()
    def half() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return ours(images)

    variants = {
        BASELINE: torch.inference_mode()(lambda: stock(images)),
        "samlora fp32": torch.inference_mode()(lambda: ours(images)),
        "samlora bf16": half,
        KEPT: torch.inference_mode()(lambda: stock(images)),
    }
    if device.type == "cuda":
        compiled = torch.compile(stock)

        @torch.inference_mode()
        def best_of_stock() -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return compiled(images)

        variants["stock amp compiled"] = best_of_stock
    expected, same, rounded = (variants[name]().float() for name in (BASELINE, "samlora fp32", "samlora bf16"))
    torch.testing.assert_close(same, expected, atol=1e-4, rtol=0)
    operations = {}
    for name in (BASELINE, "samlora fp32", "samlora bf16"):
        with FlopCounterMode(display=False) as counter:
            variants[name]()
        operations[name] = counter.get_total_flops()
    products = Products(device, batch * (size // VARIANTS[variant].stride) ** 2, VARIANTS[variant].width)
    seconds = interleave(variants, repeats, between=products, published=(BASELINE, "stock amp compiled"))
    return {
        "equality": {
            "largest_difference_fp32": (same - expected).abs().max().item(),
            "relative_error_bf16": ((rounded - expected).norm() / expected.norm()).item(),
        },
        "operations": operations,
        "product_operations_per_second": products.rates(),
        "seconds": seconds,
        "times_as_fast_as_stock_fp32": ratios(seconds, BASELINE),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "encoder")
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    config = {name: getattr(args, name) for name in ("variant", "size", "batch", "repeats")}
    config |= {"rank": 4, "threads": torch.get_num_threads()}
    what = "seconds of the image encoder's forward pass, variants in turn in one process; equal outputs asserted"
    record = heading(what, device, config, kept=True)
    record |= measure(args.variant, args.size, args.batch, args.repeats, device)
    write_record(record, args.output)
    for name, times in record["seconds"].items():
        ratio = record["times_as_fast_as_stock_fp32"].get(name, {"median": 1.0})
        print(f"{name}: {times['median']:.3f} s, {ratio['median']} times as fast as stock fp32")


if __name__ == "__main__":
    main()
