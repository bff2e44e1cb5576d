"""From one real CT to another patient: does the demo base help, and how much?

Prepares the CT of one patient (TotalSegmentator's example, 112 slices of 122 x 101) with eight organs, trains
`vit_ti` on it, and tests on 20 slices (512 x 512) of another patient, read as DICOM under its NIfTI labels.
The same with random weights instead of the demo base. Everything but the base is equal: seed, slices, steps.

    python benchmarks/real_ct.py --data FOLDER [--steps 200]

FOLDER holds ct_abdomen/ and dicom_ct/ (see the project's tests). Writes benchmarks/results/real_ct.json.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from samlora.data.grid import match_grid
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import read_volume, write_volume
from samlora.inference.config import TestConfig
from samlora.inference.testing import test
from samlora.training.config import TrainConfig
from samlora.training.loop import train
from samlora.training.run import commit, versions

ROOT = Path(__file__).resolve().parent.parent
BATCH = 8
RECIPE = ROOT / "tests" / "datasets" / "ct_abdomen.yaml"


def write_patients(data: Path, source: Path) -> Path:
    """Both patients as NIfTI, images and labels, in `source`, which is returned."""
    pairs = {
        "first": ("ct_abdomen/example_ct.nii.gz", "ct_abdomen/example_seg_fast_force_split.nii.gz"),
        "second": ("dicom_ct/example_ct_dicom", "dicom_ct/example_seg_dicom.nii.gz"),
    }
    for name, (image, label) in pairs.items():
        labels = read_volume(data / label, labels=True)
        # The second patient's result shall lie on its labels' grid, as NIfTI.
        write_volume(match_grid(read_volume(data / image), to=labels), source / "images" / f"{name}.nii.gz")
        write_volume(labels, source / "labels" / f"{name}.nii.gz")
    return source


def prepare_patients(data: Path, folder: Path) -> Path:
    """Both patients in SAMed's layout: the first to train on, the second to test on. Returns the folder."""
    source = write_patients(data, folder / "source")
    prepare(source, folder / "data", Recipe.load(RECIPE), test_cases=["second"], workers=1)
    return folder / "data"


def adapt(data: Path, folder: Path, ckpt: str | None, steps: int) -> dict:
    """Trains and tests once; returns Dice per organ and overall (strict), and the seconds of both."""
    epochs = -(-steps * BATCH // len(list((data / "train_npz").iterdir())))
    config = TrainConfig(
        root_path=str(data),
        output=str(folder / "run"),
        dataset="real_ct",
        vit_name="vit_ti",
        ckpt=ckpt,
        batch_size=BATCH,
        max_epochs=epochs,
        stop_epoch=epochs,
        max_iterations=steps,
        base_lr=0.002,
        warmup_period=40,
        precision="auto",
        save_interval=epochs,
    )
    began = time.perf_counter()
    run = train(config)
    trained = time.perf_counter()
    summary = test(
        TestConfig(
            volume_path=str(data),
            lora_ckpt=str(run / "adapter_last.safetensors"),
            output_dir=str(folder / "result"),
            dataset="real_ct",
            is_savenii=True,
            precision="auto",
        )
    )["strict"]
    organs = Recipe.load(RECIPE).classes
    there = [c["dice"]["mean"] for c in summary["classes"].values() if c["reference_ml"]["mean"] > 0]
    return {
        "dice_of_organs_there": float(np.mean(there)),
        "dice_of_all": summary["overall"]["dice"]["mean"],
        "dice_per_organ": {organs[label - 1]: figures["dice"]["mean"] for label, figures in summary["classes"].items()},
        "train_seconds": round(trained - began, 1),
        "test_seconds": round(time.perf_counter() - trained, 1),
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("SAMLORA_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/real_ct"),
        help="for the prepared data, runs and predictions",
    )
    args = parser.parse_args()
    data = prepare_patients(args.data, args.folder)
    results = {
        name: adapt(data, args.folder / name, ckpt, args.steps)
        for name, ckpt in (("demo_base", None), ("random_base", "random"))
    }
    record = {
        "what": "vit_ti adapted to one CT, tested on another patient; three of the eight organs are out of view there",
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "commit": commit(),
        "results": results,
    }
    text = json.dumps(record, indent=2).replace("NaN", "null")
    (ROOT / "benchmarks" / "results" / "real_ct.json").write_text(text + "\n")
    for name, result in results.items():
        dice, seconds = result["dice_of_organs_there"], result["train_seconds"]
        print(f"{name}: Dice {dice:.3f} after {result['steps']} steps in {seconds} s")
    print(f"difference {np.subtract(*(results[name]['dice_of_organs_there'] for name in results)):+.3f}")


if __name__ == "__main__":
    main()
