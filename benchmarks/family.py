"""Systems side by side on real images, each with the same wall-clock: who wins with a few minutes of a laptop.

`samlora compare` on two sets: ultrasound of nerves and vessels (two folds of 49 pictures, of unknown patients), and CT,
where each of two patients is held out once. `vit_ti` on the demo base, which is small and has seen drawn shapes only;
U-Nets from random weights; one learning rate, 1e-3, for all. Systems with prompts get theirs from the reference, each
the kind it trains with, and only those with equal prompts share a table.

    python benchmarks/family.py --data FOLDER [--sets ultrasound ct] [--seconds 120]      (forty minutes)

FOLDER holds ultrasound/, ct_abdomen/ and dicom_ct/ (see the project's tests). Writes benchmarks/results/family.json.
"""

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from prompts import PICTURES
from real_ct import RECIPE, write_patients
from timing import heading, options, write_record

from samlora.compare.compare import compare
from samlora.compare.config import CompareConfig
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe

SETS = {
    "ultrasound": ("unet", "samed", "samlora_joint", "medsam_decoder", "msa", "samus"),
    "ct": ("unet", "samed", "msa"),
}


def prepared(name: str, data: Path, folder: Path) -> Path:
    """A set in SAMed's layout with all of its cases to train on: its folder."""
    if name == "ct":
        prepare(write_patients(data, folder / name / "source"), folder / name / "data", Recipe.load(RECIPE), workers=1)
    else:
        source = data / "ultrasound" / "nerves_vessels"
        prepare(source, folder / name / "data", PICTURES, test_fraction=0.0, workers=1)
    return folder / name / "data"


def measure(name: str, systems: Sequence[str], data: Path, folder: Path, seconds: float) -> list[dict]:
    """The rows of the comparison's summary: system, class, measure, mean and sd over folds, and what it cost."""
    settings = {"vit_name": "vit_ti", "img_size": 256, "batch_size": 4, "accumulate": 1, "max_epochs": 100000}
    settings |= {"stop_epoch": 100000, "warmup": True, "warmup_period": 20, "base_lr": 1e-3}
    settings |= {"schedule": "constant", "schedule_steps": []}  # a configuration may name steps of its own
    config = CompareConfig(
        data=str(prepared(name, data, folder)),
        output=str(folder / name / "comparison"),
        folds=2,
        set=settings,
        max_seconds=seconds,
        pictures=0,
    )
    compare(systems, config)
    with open(Path(config.output) / "summary.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "family")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--systems", nargs="+", help="instead of each set's own")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--folder", type=Path, help="where data and runs go, and are kept (default: nowhere)")
    args = parser.parse_args(arguments)
    config = {"seconds": args.seconds, "folds": 2, "size": 256, "batch": 4, "threads": torch.get_num_threads()}
    record = heading("systems compared at equal wall-clock, held-out folds", torch.device("cpu"), config)
    with tempfile.TemporaryDirectory() as folder:
        place = args.folder or Path(folder)
        record["sets"] = {
            name: measure(name, args.systems or SETS[name], args.data, place, args.seconds) for name in args.sets
        }
    write_record(record, args.output)


if __name__ == "__main__":
    main()
