"""A click on an image that is encoded: samlora's Predictor against segment_anything's SamPredictor.

Same random weights, same image. Logits must agree to 1e-3 and masks on all but 1 in 10,000 pixels. A first click asks
for three masks; a second one gives an answer's logits back as mask prompt.

    python benchmarks/clicks.py [--size 512] [--device cuda]       (CPU: one minute)

Writes benchmarks/results/clicks.json.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, Sam, TwoWayTransformer
from timing import heading, interleave, options, write_record

import samlora
from samlora.pixels import SAM

FIRST, SECOND = (0.4, 0.3), (0.7, 0.8)  # x, y as shares of the image's sides


def predictors(variant: str, size: int, device: torch.device) -> tuple[samlora.Predictor, SamPredictor]:
    """Ours, and Meta's predictor, prompt encoder and decoder with the same weights; the encoder is shared."""
    model = samlora.build_model("sam", "random:0", variant, size, pixels=SAM).to(device).eval()
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(num_multimask_outputs=3, transformer=transformer, transformer_dim=256)
    decoder.load_state_dict(model.mask_decoder.state_dict())
    stock = Sam(model.image_encoder, model.prompt_encoder, decoder).to(device).eval()
    return samlora.Predictor(model), SamPredictor(stock)


def measure(variant: str, size: int, pixels: int, repeats: int, device: torch.device, check: bool = True) -> dict:
    """Seconds of a first and of a second click, and how far the answers are apart.

    check: whether AssertionError is raised unless both give the same, as they do on a CPU.
    """
    ours, stock = predictors(variant, size, device)
    image = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), np.uint8)
    ours.set_image(image)
    stock.set_image(image)
    points, labels = np.array([FIRST, SECOND]) * pixels, np.array([1, 0])
    low = ours.predict(points[:1]).logits
    given: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None, bool]] = {
        "first click": (points[:1], labels[:1], None, True),
        "second click": (points, labels, low, False),
    }

    def asked(who: Callable, name: str) -> Callable[[], tuple[np.ndarray, ...]]:
        points, labels, mask, multimask = given[name]
        return lambda: who(points, labels, None, mask, multimask)

    variants, equality = {}, {}
    for name in given:
        variants[f"stock {name}"] = asked(stock.predict, name)
        variants[f"samlora {name}"] = asked(ours.predict, name)
        wanted, found = (variants[f"{who} {name}"]() for who in ("stock", "samlora"))
        difference, pixels_apart = np.abs(found[2] - wanted[2]).max(), (found[0] != wanted[0]).mean()
        assert not check or (difference < 1e-3 and pixels_apart < 1e-4), (name, difference, pixels_apart)
        equality[name] = {"largest_difference_of_logits": float(difference), "share_of_pixels": float(pixels_apart)}
    seconds = interleave(
        variants, repeats, warm_up=3, published=[name for name in variants if name.startswith("stock")]
    )
    ratios = {
        name: {
            kind: round(seconds[f"stock {name}"][kind] / seconds[f"samlora {name}"][kind], 2)
            for kind in ("median", "min")
        }
        for name in given
    }
    return {"equality": equality, "seconds": seconds, "times_as_fast_as_stock": ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "clicks")
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--size", type=int, default=512, help="side of the model's input")
    parser.add_argument("--pixels", type=int, default=512, help="side of the image")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    config = {name: getattr(args, name) for name in ("variant", "size", "pixels", "repeats")}
    config |= {"threads": torch.get_num_threads()}
    what = "seconds from a click to its mask on the image's pixels, fp32, encoded before; equal outputs asserted"
    record = heading(what, device, config, kept=True)
    record |= measure(args.variant, args.size, args.pixels, args.repeats, device)
    write_record(record, args.output)
    for name, times in record["seconds"].items():
        print(f"{name}: median {1e3 * times['median']:.1f} ms, shortest {1e3 * times['min']:.1f} ms")


if __name__ == "__main__":
    main()
