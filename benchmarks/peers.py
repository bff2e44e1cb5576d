"""The image encoder with LoRA, forward and a training step: samlora against transformers with peft.

Both have ViT-B at 512 px and the same base weights. peft puts its LoRA on the whole fused qkv, so it adapts k too;
samlora's is SAMed's, on q and v. With LoRA at zero, where training begins, fp32 embeddings must agree to 1e-4 before
anything is timed. A step is forward, a fixed linear loss on the embeddings, backward and AdamW on LoRA alone:
transformers' decoder gives no background mask, so that SAMed's whole step cannot be made with it. For the forward pass
both merge LoRA into the weights. transformers runs with each of its two kinds of attention.

    python benchmarks/peers.py [--batch 2]       (needs transformers and peft; ten minutes)

Writes benchmarks/results/peers.json.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from timing import PACKAGES, heading, interleave, options, ratios, write_record
from torch import Tensor, nn

import samlora
from samlora.model.build import build_model
from samlora.model.sam import ImageEncoder
from samlora.model.variants import VARIANTS

BASELINE = "transformers eager fp32"
RANK = 4
# Meta's name of a part -> transformers' name of it
NAMES = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.", "layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
)


def our_encoder(variant: str, size: int) -> ImageEncoder:
    """samlora's encoder with LoRA as training begins, on random weights that leave nothing at zero but LoRA's B."""
    torch.manual_seed(0)
    encoder = build_model("samed", "random:0", variant, size, 8, RANK).image_encoder
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.02)
    return encoder


def their_encoder(ours: ImageEncoder, variant: str, size: int, attention: str) -> nn.Module:
    """transformers' encoder with the weights of `ours`, in peft's LoRA on qkv, as training begins."""
    from peft import LoraConfig, get_peft_model
    from transformers import SamVisionConfig, SamVisionModel

    row = VARIANTS[variant]
    config = SamVisionConfig(
        hidden_size=row.width,
        num_hidden_layers=row.depth,
        num_attention_heads=row.heads,
        global_attn_indexes=row.global_blocks,
        image_size=size,
        attn_implementation=attention,
    )
    model = SamVisionModel(config)
    state = {}
    for name, tensor in ours.state_dict().items():
        if "linear_" in name:
            continue
        for part, theirs in NAMES:
            name = name.replace(part, theirs)
        state[f"vision_encoder.{name}"] = tensor
    model.load_state_dict(state)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"]))


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """The embeddings (B, 256, S/16, S/16) of either model."""
    return model(images) if isinstance(model, ImageEncoder) else model(images).last_hidden_state


def make_step(model: nn.Module, images: Tensor, half: bool) -> Callable[[], None]:
    """A function that takes one step of training LoRA."""
    generator = torch.Generator().manual_seed(3)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1)
    side = images.shape[-1] // 16
    direction = torch.randn(len(images), 256, side, side, generator=generator)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            embeddings = embed(model, images)
        loss = (embeddings.float() * direction).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def make_forward(model: nn.Module, images: Tensor, half: bool) -> Callable[[], Tensor]:
    """A function that gives the embeddings, for use and not for training."""

    @torch.inference_mode()
    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return embed(model, images).float()

    return forward


def measure(variant: str, size: int, batch: int, repeats: int) -> dict:
    """Seconds of every variant's step and forward pass; raises AssertionError unless fp32 embeddings agree to 1e-4."""
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
    ours = our_encoder(variant, size)
    models = {"samlora": ours}
    models |= {f"transformers {kind}": their_encoder(ours, variant, size, kind) for kind in ("eager", "sdpa")}
    found = {name: make_forward(model.eval(), images, half=False)() for name, model in models.items()}
    differences = {name: (found[name] - found["samlora"]).abs().max().item() for name in found if name != "samlora"}
    assert max(differences.values()) <= 1e-4, differences
    counts = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    formats = {"fp32": False, "bf16": True}
    theirs = [f"{name} {kind}" for name in models if name != "samlora" for kind in formats]

    def each(make: Callable) -> dict[str, Callable]:
        return {f"{n} {kind}": make(m, images, half) for n, m in models.items() for kind, half in formats.items()}

    step = interleave(each(make_step), repeats, published=theirs)
    merged = {n: samlora.merge(m) if n == "samlora" else m.merge_and_unload() for n, m in models.items()}
    models = {name: model.eval() for name, model in merged.items()}
    forward = interleave(each(make_forward), repeats, published=theirs)
    return {
        "largest_difference_fp32": differences,
        "trained_parameters": counts,
        "step": {"seconds": step, "times_as_fast": ratios(step, BASELINE)},
        "forward": {"seconds": forward, "times_as_fast": ratios(forward, BASELINE)},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "peers")
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    if not all(importlib.util.find_spec(name) for name in ("transformers", "peft")):
        print("not measured: this compares with transformers and peft; install both: pip install transformers peft")
        return
    config = {name: getattr(args, name) for name in ("variant", "size", "batch", "repeats")}
    config |= {"rank": RANK, "threads": torch.get_num_threads()}
    what = "seconds of the image encoder's forward pass and training step, variants in turn in one process"
    record = heading(what, torch.device("cpu"), config, (*PACKAGES, "transformers", "peft"), kept=True)
    record |= measure(args.variant, args.size, args.batch, args.repeats)
    write_record(record, args.output)
    for kind in ("forward", "step"):
        for name, times in record[kind]["seconds"].items():
            ratio = record[kind]["times_as_fast"].get(name, {"median": 1.0})["median"]
            print(f"{kind}: {name}: {times['median']:.3f} s, {ratio} times as fast as {BASELINE}")


if __name__ == "__main__":
    main()
