"""A CT of 148 x 512 x 512 with eight organs predicted, measured and written: samlora against the published way.

The published way is stock segment_anything with textbook LoRA in fp32, one slice at a time, each shrunk to 224 and
enlarged to 512 px by scipy, Dice and HD95 of whole volumes by MedPy, the result written by SimpleITK. Both take the
same prepared slices, a batch of slices in turn, and do everything else in this process.

The network is ViT-B with random weights: it costs what trained ones cost, but its label maps are noise. Measuring and
writing therefore take the label map of a second model, `vit_ti` trained on drawn patients as `samlora demo` trains it.
Equal outputs: in fp32 the label maps of both models are those of the published way but for ties of the argmax; how far
bfloat16 changes what the trained model finds is recorded, and the measures are equal to 1e-9.

    python benchmarks/volume.py [--slices 24]      (all slices: about twenty minutes, most of it the published way)

With --slices only as many, evenly spaced, go through ViT-B, and the seconds are scaled to the volume; the record says
so. Writes benchmarks/results/volume.json.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from plain import PlainSam, plain_copy, predict_slice, random_system, samed_measures
from scipy.ndimage import zoom
from timing import PACKAGES, heading, options, timed, write_record
from torch import nn

import samlora
from samlora.allocator import keep_freed_memory
from samlora.data.grid import Case, Volume
from samlora.data.phantom import abdomen, write_cases
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import read_volume, write_volume
from samlora.evaluation.metrics import evaluate_case
from samlora.inference.predict import predict_volume
from samlora.model.sam import Sam
from samlora.options import make, read_yaml
from samlora.training.config import TrainConfig
from samlora.training.loop import train

BASELINE = "published way"
OURS = {"samlora fp32": torch.float32, "samlora bf16": torch.bfloat16}
SHAPE, SPACING = (512, 512, 148), (0.7, 0.7, 1.35)  # x, y, z in voxels and mm
INPUT_SIZE = 224  # to which SAMed's test shrinks slices
CLASSES = 8
PREDICTING = ("network", "resizing_and_labels")  # labels: logits enlarged, argmax
MOST_TIES = 1e-4  # share of voxels whose fp32 label may differ: two logits equal but for rounding


def draw(shape: Sequence[int], spacing: Sequence[float], recipe: Recipe) -> Case:
    """A drawn patient, not one of those trained on, as a prepared case with labels.

    Drawn at half the resolution and enlarged, images linearly, since drawing takes memory for eight samples a voxel.
    """
    half = [size // 2 for size in shape]
    hu, labels, affine = abdomen(99, half, [2 * step for step in spacing])
    affine = affine @ np.diag([0.5, 0.5, 0.5, 1.0])
    image = zoom(hu.astype(np.float32), 2, order=1, grid_mode=True, mode="nearest")
    for axis in range(3):
        labels = labels.repeat(2, axis)
    return recipe.to_case(Volume(image, affine, 1, 1), Volume(labels, affine, 1, 1))


def train_adapter(folder: Path) -> Path:
    """The adapter of a `vit_ti` on its demo base, trained as `samlora demo` does, on slices of 224 px."""
    write_cases(folder / "patients", CLASSES)
    prepare(folder / "patients", folder / "data", "synapse", size=INPUT_SIZE, test_cases=["case0001"])
    values = read_yaml("demo_vit_ti") | {"root_path": str(folder / "data"), "output": str(folder)}
    run = train(make(TrainConfig, values))
    return run / "adapter_last.safetensors"


class Clock:
    """Seconds that a model spends in its forward pass, and nothing else of what calls it."""

    def __init__(self, model: nn.Module):
        self.seconds = 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self.began = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began


def predict(model: Sam, image: np.ndarray, recipe: Recipe, batch: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Seconds of all variants, `batch` slices of (D, H, W) in turn, and their labels (D, H, W).

    Seconds are {variant: {part: seconds}}, the parts of PREDICTING: what is not the network's forward pass is the
    second. Raises AssertionError when more than MOST_TIES of the fp32 labels differ. Leaves LoRA merged.
    """
    stock: PlainSam = plain_copy(model).eval()
    ours = samlora.merge(model).eval()
    clocks = {stock: Clock(stock), ours: Clock(ours)}
    variants = {BASELINE: (stock, lambda part: np.stack([predict_slice(stock, x, recipe.size) for x in part]))}
    for name, precision in OURS.items():
        variants[name] = (ours, lambda part, precision=precision: ours_of(ours, part, recipe, precision))
    for _, function in variants.values():
        function(image[:1])
    seconds = {name: dict.fromkeys(PREDICTING, 0.0) for name in variants}
    labels: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    for start in range(0, len(image), batch):
        for name, (module, function) in variants.items():
            clocks[module].seconds = 0.0
            keep_freed_memory(name != BASELINE)  # as each runs in its own program
            took, found = timed(function, image[start : start + batch])
            network = clocks[module].seconds
            for kind, part in zip(PREDICTING, (network, took - network)):
                seconds[name][kind] += part
            labels[name].append(found)
    whole = {name: np.concatenate(parts) for name, parts in labels.items()}
    assert np.mean(whole["samlora fp32"] != whole[BASELINE]) <= MOST_TIES
    return seconds, whole


def ours_of(model: Sam, part: np.ndarray, recipe: Recipe, precision: torch.dtype) -> np.ndarray:
    """The labels (D, H, W) of some slices, by `predict_volume`."""
    found = predict_volume(model, Case(part), recipe, batch_size=len(part), precision=precision)
    return found.array.transpose(2, 1, 0)


def agreement(labels: dict[str, np.ndarray]) -> dict:
    """How the label maps of `predict` differ, in fp32 from the published ones and in bfloat16 from fp32."""
    full, half = labels["samlora fp32"], labels["samlora bf16"]
    foreground = (full > 0) | (half > 0)
    dice = [
        2 * np.count_nonzero((full == label) & (half == label)) / (np.count_nonzero(full == label) + count)
        for label in range(1, CLASSES + 1)
        if (count := np.count_nonzero(half == label))
    ]
    return {
        "share_of_voxels_that_differ_fp32": float(np.mean(full != labels[BASELINE])),
        "share_of_foreground_equal_in_bf16": float(np.mean((full == half)[foreground])),
        "lowest_dice_of_an_organ_between_bf16_and_fp32": float(min(dice)),
        "organs_found": len(dice),
    }


def measure(prediction: np.ndarray, case: Case) -> dict:
    """Seconds of both ways to measure a label map (D, H, W); raises AssertionError unless values agree to 1e-9."""
    organs = range(1, CLASSES + 1)
    ours, found = timed(evaluate_case, prediction, case.label, case.spacing, list(organs))
    theirs, published = timed(lambda: [samed_measures(prediction == n, case.label == n) for n in organs])
    values = [(found["samed"][n]["dice"], found["samed"][n]["hd95"]) for n in organs]
    np.testing.assert_allclose(values, published, rtol=0, atol=1e-9)
    dice = [found["strict"][n]["dice"] for n in organs]
    return {"seconds": {BASELINE: theirs, "samlora": ours}, "dice_with_the_drawing": float(np.nanmean(dice))}


def write(prediction: Volume, stack: np.ndarray, folder: Path) -> dict[str, float]:
    """Seconds of both ways to write a label map; raises AssertionError unless both files hold it."""

    def published() -> None:
        image = SimpleITK.GetImageFromArray(stack.astype(np.float32))
        image.SetSpacing((1, 1, prediction.spacing[2]))
        SimpleITK.WriteImage(image, str(folder / "published.nii.gz"))

    theirs, _ = timed(published)
    ours, _ = timed(write_volume, prediction, folder / "samlora.nii.gz")
    for name in ("published", "samlora"):
        written = read_volume(folder / f"{name}.nii.gz", labels=True).array
        np.testing.assert_array_equal(written, prediction.array)
    return {BASELINE: theirs, "samlora": ours}


def summary(parts: dict[str, dict[str, float]], share: float) -> dict:
    """Seconds of the whole volume and ratios, from those of the parts; the network saw `share` of the slices."""
    whole = {
        name: sum(seconds / share if part in PREDICTING else seconds for part, seconds in of.items())
        for name, of in parts.items()
    }
    return {
        "seconds_of_volume": {name: round(seconds, 2) for name, seconds in whole.items()},
        "times_as_fast_as_published": {name: round(whole[BASELINE] / whole[name], 2) for name in OURS},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "volume")
    parser.add_argument("--slices", type=int, default=SHAPE[2], help="of the volume, that go through ViT-B")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--adapter", type=Path, help="of a vit_ti trained before as this script would train it")
    args = parser.parse_args(arguments)
    config = {"shape_xyz": list(SHAPE), "spacing_mm": list(SPACING), "slices": args.slices, "batch": args.batch}
    config |= {"variant": "vit_b", "rank": 4, "classes": CLASSES, "repeats": 1, "threads": torch.get_num_threads()}
    what = "seconds of predicting, measuring and writing a volume; each part once; equal outputs asserted"
    recipe = replace(Recipe.load("synapse"), size=INPUT_SIZE)
    case = draw(SHAPE, SPACING, recipe)
    with tempfile.TemporaryDirectory() as name:
        small = samlora.load_model(args.adapter or train_adapter(Path(name)))
        record = heading(what, torch.device("cpu"), config, (*PACKAGES, "SimpleITK"), kept=True)
        small_seconds, found = predict(small, case.image, recipe, args.batch)
        prediction = predict_volume(small, case, recipe)
        measured = measure(found["samlora fp32"], case)
        written = write(prediction, prediction.array.transpose(2, 1, 0), Path(name))
    chosen = np.linspace(0, len(case.image) - 1, args.slices).round().astype(int)
    parts, noise = predict(random_system("vit_b", 512, CLASSES), case.image[chosen], recipe, args.batch)
    for who, seconds in parts.items():
        side = BASELINE if who == BASELINE else "samlora"
        seconds |= {"measuring": measured["seconds"][side], "writing": written[side]}
    record |= {"seconds": parts, "scaled_from_slices": args.slices if args.slices < len(case.image) else None}
    record |= summary(parts, args.slices / len(case.image))
    record["equality"] = {"vit_b, random weights": agreement(noise), "vit_ti, trained": agreement(found)}
    record["trained_vit_ti"] = {"dice_with_the_drawing": measured["dice_with_the_drawing"], "seconds": small_seconds}
    write_record(record, args.output)
    for who, seconds in record["seconds_of_volume"].items():
        print(f"{who}: {seconds} s, {record['times_as_fast_as_published'].get(who, 1.0)} times as fast")


if __name__ == "__main__":
    main()
