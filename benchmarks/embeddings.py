"""An epoch of training MedSAM's mask decoder alone: with embeddings kept from the first epoch, against computing them.

ViT-B, random weights, one box a slice. The baseline is stock segment_anything: the frozen encoder without a graph and
the decoder image by image, fp32. Both take the same steps of AdamW; the losses of an epoch must agree to 1e-4 before
anything is timed. What the first epoch costs, when the embeddings are made, is recorded too.

    python benchmarks/embeddings.py [--count 8] [--device cuda --count 96 --batch 12]       (CPU: about five minutes)

Writes benchmarks/results/embeddings.json.
"""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from timing import heading, interleave, options, ratios, write_record
from torch import Tensor, nn

from samlora.data.arrays import write_slice
from samlora.data.dataset import Sample, SliceDataset, find_slices
from samlora.model.build import build_model
from samlora.model.variants import EMBED, STOCK_MASKS, VARIANTS, WINDOW
from samlora.training.config import TrainConfig
from samlora.training.embeddings import EmbeddingCache
from samlora.training.objectives import make_objective
from samlora.training.prompting import draw_objects
from samlora.training.setup import make_optimizer

BASELINE = "stock, encoder in every epoch"
OURS, CACHED = "samlora, encoder in every epoch", "samlora, embeddings kept"


class StockMedSam(nn.Module):
    """Stock modules with a frozen encoder, called as MedSAM's training does, one image at a time."""

    def __init__(self, variant: str, size: int):
        super().__init__()
        row, grid = VARIANTS[variant], size // VARIANTS[variant].stride
        self.image_encoder = ImageEncoderViT(
            img_size=size, embed_dim=row.width, depth=row.depth, num_heads=row.heads, use_rel_pos=True,
            window_size=WINDOW, global_attn_indexes=row.global_blocks, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        self.prompt_encoder = PromptEncoder(EMBED, (grid, grid), (size, size), mask_in_chans=16)
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=STOCK_MASKS - 1,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED, mlp_dim=2048, num_heads=8),
            transformer_dim=EMBED,
        )

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        with torch.no_grad():
            embeddings = self.image_encoder(images)
        masks = []
        for embedding, box in zip(embeddings, boxes):
            with torch.no_grad():
                sparse, dense = self.prompt_encoder(points=None, boxes=box[None], masks=None)
            place = self.prompt_encoder.get_dense_pe()
            mask, _ = self.mask_decoder(embedding[None], place, sparse, dense, multimask_output=False)
            masks.append(mask)
        return torch.cat(masks)


def slices(folder: Path, count: int, size: int) -> SliceDataset:
    """Noise with one ellipse a slice, written as `samlora prepare` writes."""
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:size, :size] / size
    for index in range(count):
        centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.25, 2)
        label = (((rows - centre[0]) / radius[0]) ** 2 + ((cols - centre[1]) / radius[1]) ** 2 < 1).astype(np.uint8)
        image = (0.3 + 0.3 * label + rng.normal(0, 0.1, label.shape)).clip(0, 1).astype(np.float32)
        write_slice(folder / f"case_slice{index:03d}.npz", image, label)
    return SliceDataset(find_slices(folder), seed=0, augment="none")


def measure(variant: str, size: int, count: int, batch: int, repeats: int, device: torch.device) -> dict:
    """Seconds of an epoch; raises AssertionError unless the losses of one agree to 1e-4."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = slices(Path(folder), count, size)
        config = TrainConfig(base_lr=1e-4, weight_decay=0.01)

        def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(0)
            model = build_model("medsam_decoder", "random:0", variant, size, num_classes=1).to(device).train()
            return model, make_optimizer(config, model, device)

        model, _ = fresh()
        began = time.perf_counter()
        cache = EmbeddingCache(Path(folder) / "cache", model, dataset, torch.float32, batch)
        first = time.perf_counter() - began

        def batches() -> list[list[Sample]]:
            samples = [dataset[0, index] for index in range(count)]
            return [samples[start : start + batch] for start in range(0, count, batch)]

        def ours(model: nn.Module, optimizer: torch.optim.Optimizer, kept: EmbeddingCache | None) -> list[float]:
            objective, losses = make_objective(config, model), []
            for part in batches():
                known = None if kept is None else kept.batch([s.key[1] for s in part], device)
                loss = objective(model, part, len(part), None, known).total
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        def stock(plain: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
            asked, losses = make_objective(config, model).prompting, []
            for part in batches():
                images = torch.stack([torch.from_numpy(s.image) for s in part])[:, None].expand(-1, 3, -1, -1)
                objects = draw_objects(part, asked, size, model.spec.pixels, config.seed, device)
                low, high = (getattr(images, way)((1, 2, 3), keepdim=True) for way in ("amin", "amax"))
                images = (images - low) / (high - low)  # as MedSAM prepares them
                logits = plain(images.to(device), objects.prompts.boxes)
                targets = objects.targets[:, None]
                loss = DiceLoss(sigmoid=True, squared_pred=True)(logits, targets)
                loss = loss + F.binary_cross_entropy_with_logits(logits, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        plain = StockMedSam(variant, size).to(device)
        plain.load_state_dict(model.state_dict())
        trained = [p for n, p in plain.named_parameters() if dict(model.named_parameters())[n].requires_grad]
        of_stock = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
        every, kept = fresh(), fresh()
        epochs = {
            BASELINE: lambda: stock(plain, of_stock),
            OURS: lambda: ours(*every, None),
            CACHED: lambda: ours(*kept, cache),
        }
        losses = {name: epoch() for name, epoch in epochs.items()}
        for name in (OURS, CACHED):
            np.testing.assert_allclose(losses[name], losses[BASELINE], atol=1e-4)
        seconds = interleave(epochs, repeats, warm_up=0, published=(BASELINE,))
        stored = sum(path.stat().st_size for path in (Path(folder) / "cache").glob("*") if path.is_file())
    return {
        "losses_of_first_epoch": losses,
        "seconds_of_an_epoch": seconds,
        "seconds_to_make_embeddings": first,
        "bytes_a_slice": stored // count,
        "times_as_fast_as_stock": ratios(seconds, BASELINE),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "embeddings")
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--count", type=int, default=8, help="slices of an epoch")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    config = {name: getattr(args, name) for name in ("variant", "size", "count", "batch", "repeats")}
    config |= {"threads": torch.get_num_threads()}
    what = "seconds of an epoch of decoder-only training, variants in turn in one process, fp32; equal losses asserted"
    record = heading(what, device, config, kept=True)
    record |= measure(args.variant, args.size, args.count, args.batch, args.repeats, device)
    write_record(record, args.output)
    for name, times in record["seconds_of_an_epoch"].items():
        ratio = record["times_as_fast_as_stock"].get(name, {"median": 1.0})["median"]
        print(f"{name}: {times['median']:.2f} s an epoch, {ratio} times as fast as stock")


if __name__ == "__main__":
    main()
