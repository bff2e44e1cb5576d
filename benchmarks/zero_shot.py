"""What LiteMedSAM does on real images without any training, by boxes taken from reference labels.

Dice of the label maps that `samlora predict --boxes_from` writes, one number for each structure: by
a tight box on every slice that shows it, by boxes each side of which is moved outwards by 0 to 5
pixels of the slice, and, in volumes, by one tight box on the slice that shows most of it, carried
through the volume (`--propagate`). Of pictures the mean over the pictures that show the structure.

On the CT with 512 px also three ways to carry a mask as LiteMedSAM's own code does it, which never
stops: the next prompt is the bounding box of the last mask, 3 px wider in pixels of the model's
input (an empty mask falls back to the first box); that mask itself; or both.

    python benchmarks/zero_shot.py --data FOLDER [--sets NAME ...] [--add] [--ckpt FILE]

FOLDER holds ct_abdomen/, dicom_ct/, mr/, ultrasound/ and xray/ (see the project's tests). Writes
benchmarks/results/zero_shot.json; with --add the other sets of that record stay in it.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from timing import ROOT, heading, options, write_record

from samlora.data.boxes import ReferenceBoxes
from samlora.data.folders import Pair
from samlora.data.grid import case_to_volume
from samlora.data.layouts import find_pairs
from samlora.data.prompts import tight_box
from samlora.data.sources import on_grid
from samlora.data.volume import read_volume, write_volume
from samlora.inference.boxes import label_by_boxes
from samlora.inference.predictor import Predictor
from samlora.model.bases import find_base
from samlora.training.run import commit

JITTER = 5  # pixels of the slice
MARGIN = 3  # pixels of the model's input
SEED = 1234
ORGANS = {5: "liver", 1: "spleen", 6: "stomach", 7: "pancreas", 52: "aorta"}
SETS = {
    "CT, 512 px": ORGANS,
    "CT, 3 mm": ORGANS | {2: "right kidney", 3: "left kidney", 4: "gallbladder"},
    "MR, brain": {1: "tumour"},
    "ultrasound": {1: "nerve", 2: "vessel"},
    "X-ray, hip": {1: "femur"},
}
VOLUMES = {
    "CT, 512 px": ("dicom_ct/example_ct_dicom", "dicom_ct/example_seg_dicom.nii.gz"),
    "CT, 3 mm": (
        "ct_abdomen/example_ct.nii.gz",
        "ct_abdomen/example_seg_fast_force_split.nii.gz",
    ),
    "MR, brain": ("mr/brain_tumour/brain1_image.nrrd", "mr/brain_tumour/brain1_label.nrrd"),
}
COMPARED = "CT, 512 px"  # where ways to carry a mask are compared


def cases(name: str, data: Path, folder: Path) -> Iterator[Pair]:
    """The images of a set with their label maps; what must be converted goes to `folder`."""
    if name in VOLUMES:
        image, label = (data / path for path in VOLUMES[name])
        yield Pair(image.name, (image,), label)
    elif name == "ultrasound":
        pairs = find_pairs(data / "ultrasound" / "nerves_vessels").pairs
        yield from (pair for pair in pairs if pair.test)
    else:
        for path in sorted((data / "xray" / "hip").glob("*/img.npy")):
            label = folder / f"{path.parent.name}.npy"
            write_volume(read_volume(path.with_name("seg.npy"), labels=True, threshold=0.5), label)
            yield Pair(path.parent.name, (path,), label)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two masks, not both empty."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def measure(predictor: Predictor, pair: Pair, names: dict[int, str]) -> dict[str, dict[str, float]]:
    """Prompt -> structure -> Dice of one image."""
    image = read_volume(pair.images[0])
    truth = on_grid(read_volume(pair.label, labels=True), image).array
    predictor.set_image(image)
    prompts = {"tight box": (0, False), f"box + 0..{JITTER} px": (JITTER, False)}
    if len(predictor) > 1:
        prompts["one tight box, propagated"] = (0, True)
    found = {}
    for prompt, (jitter, once) in prompts.items():
        source = ReferenceBoxes(pair.label, [pair], jitter, SEED, largest=once)
        boxes, _ = source.boxes(pair, predictor.case)
        wanted = [box for box in boxes if box.label in names]
        labels = case_to_volume(predictor.case, label_by_boxes(predictor, wanted, once)).array
        found[prompt] = {
            name: dice(labels == value, truth == value)
            for value, name in names.items()
            if (truth == value).any()
        }
    return found


def compare_ways(predictor: Predictor, pair: Pair, names: dict[int, str]) -> dict[str, dict]:
    """Way to carry a mask -> structure -> Dice, on the image that the predictor holds."""
    truth = on_grid(read_volume(pair.label, labels=True), read_volume(pair.images[0])).array
    boxes, _ = ReferenceBoxes(pair.label, [pair], 0, SEED, largest=True).boxes(pair, predictor.case)
    found: dict[str, dict] = {}
    for way in ("box", "mask", "box and mask"):
        found[way] = {}
        for box in boxes:
            if box.label in names:
                masks = carried(predictor, box.first, np.array(box.corners), way)
                drawn = case_to_volume(predictor.case, masks).array
                found[way][names[box.label]] = dice(drawn, truth == box.label)
    return found


def carried(predictor: Predictor, index: int, box: np.ndarray, way: str) -> np.ndarray:
    """Masks (D, H, W) bool from one box, carried over all slices as LiteMedSAM's code does it."""
    height, width = predictor.image.shape[:2]
    margin = MARGIN * max(height, width) / predictor.model.image_size
    masks = np.zeros(predictor.case.image.shape[:3], bool)
    first = predictor.predict(box=box, index=index)
    masks[index] = first.masks[0]
    for step in (1, -1):
        answer, at = first, index + step
        while 0 <= at < len(masks):
            following = box
            if answer.masks[0].any():
                low, high = np.split(tight_box(answer.masks[0]), 2)
                following = np.concatenate([low - margin, high + margin])
                following = np.clip(following, 0, (width - 1, height - 1) * 2)
            given = {"box": following, "mask": answer.logits[0]}
            used = {kind: value for kind, value in given.items() if kind in way}
            answer = predictor.predict(**used, index=at)
            masks[at] = answer.masks[0]
            at += step
    return masks


def measure_set(predictor: Predictor, name: str, data: Path) -> dict:
    """The figures of a set: Dice by prompt and structure, and how long all of it took."""
    began, names = time.perf_counter(), SETS[name]
    results, slices, record = [], 0, {}
    with tempfile.TemporaryDirectory() as folder:
        for pair in cases(name, data, Path(folder)):
            results.append(measure(predictor, pair, names))
            slices += len(predictor)
            if name == COMPARED:
                record["carried_without_end"] = compare_ways(predictor, pair, names)
    record["dice"] = {
        prompt: {
            structure: round(float(np.mean(found)), 4)
            for structure in names.values()
            if (found := [one[prompt][structure] for one in results if structure in one[prompt]])
        }
        for prompt in results[0]
    }
    about = {"images": len(results), "slices": slices, "commit": commit()}
    return about | {"seconds": round(time.perf_counter() - began, 1)} | record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "zero_shot")
    shared = os.environ.get("SAMLORA_DATA") or ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--ckpt", type=Path, help="another base than LiteMedSAM")
    parser.add_argument("--add", action="store_true", help="to the record in --output")
    args = parser.parse_args(arguments)
    predictor = Predictor.load(base=args.ckpt or find_base("lite_medsam"))
    spec = predictor.model.spec
    config = {"base": spec.base, "base_sha256": spec.base_sha256, "side": spec.image_size}
    config |= {"precision": "fp32", "threads": torch.get_num_threads(), "seed": SEED}
    config |= {"margin_of_carried_boxes": MARGIN}
    what = "Dice by boxes from reference labels, without training"
    record = heading(what, torch.device("cpu"), config)
    record["sets"] = {}
    if args.add and args.output.exists():
        record["sets"] = json.loads(args.output.read_text(encoding="utf-8"))["sets"]
    for name in args.sets:
        record["sets"][name] = measure_set(predictor, name, args.data)
        write_record(record, args.output)
        for prompt, found in record["sets"][name]["dice"].items():
            listed = ", ".join(f"{structure} {value:.3f}" for structure, value in found.items())
            print(f"{name}, {prompt}: {listed}", flush=True)


if __name__ == "__main__":
    main()
