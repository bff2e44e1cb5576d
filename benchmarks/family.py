"""Systems side by side on real images, each with the same wall-clock: who wins with a few minutes of a laptop.

`samlora compare` on two sets: ultrasound of nerves and vessels (two folds of 49 pictures, of unknown patients), and CT,
where each of two patients is held out once. LiteMedSAM as the base, LoRA in its last two attention blocks; what the
frozen part of the encoder makes of the slices is computed once. A U-Net from random weights, augmented, trains as long
as the others and their encoding together. One learning rate, 1e-3, for all. Systems with prompts get theirs from the
reference, each the kind it trains with, and only those with equal prompts share a table.

    python benchmarks/family.py --data FOLDER [--sets ultrasound ct] [--seconds 60]

FOLDER holds ultrasound/, ct_abdomen/ and dicom_ct/ (see the project's tests). Writes benchmarks/results/family.json.
"""

import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from prompts import BASE, BATCH, CPU, LAYERS, PICTURES
from real_ct import RECIPE, write_patients
from timing import heading, options, timed, write_record

from samlora.compare.compare import compare
from samlora.compare.config import CompareConfig
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.device import DTYPES, pick_precision
from samlora.model.build import build_model
from samlora.model.methods import system_row

FOLDS = 2
SETS = {
    "ultrasound": ("unet", "samed", "samlora_joint", "medsam_decoder"),
    "ct": ("unet", "samed"),
}


def prepared(name: str, data: Path, folder: Path) -> Path:
    """A set in SAMed's layout with all of its cases to train on: its folder."""
    if name == "ct":
        prepare(write_patients(data, folder / name / "source"), folder / name / "data", Recipe.load(RECIPE), workers=1)
    else:
        source = data / "ultrasound" / "nerves_vessels"
        prepare(source, folder / name / "data", PICTURES, test_fraction=0.0, workers=1)
    return folder / name / "data"


def seconds_a_slice() -> float:
    """What encoding one slice takes with LiteMedSAM, in the number format of training."""
    model = build_model("sam", variant=BASE).eval()
    images = torch.rand(BATCH, 3, model.image_size, model.image_size)
    kind = DTYPES[pick_precision("auto", CPU)]
    with torch.inference_mode(), torch.autocast("cpu", kind, enabled=kind != torch.float32):
        model.encode(images)
        took, _ = timed(model.encode, images)
    return took / BATCH


def measure(name: str, systems: Sequence[str], data: Path, folder: Path, seconds: float) -> dict:
    """The rows of the comparisons' summaries: system, class, measure, mean and sd over folds, and what it cost."""
    data = prepared(name, data, folder)
    slices = len(list((data / "train_npz").iterdir()))
    encoding = seconds_a_slice() * slices / FOLDS  # of a run: the folds of two patients differ, their mean does not
    common = {"img_size": 256, "batch_size": BATCH, "accumulate": 1, "max_epochs": 100000, "stop_epoch": 100000}
    common |= {"warmup": True, "warmup_period": 20, "base_lr": 1e-3, "precision": "auto"}
    common |= {"schedule": "constant", "schedule_steps": []}  # a configuration may name steps of its own
    on_base = {"vit_name": BASE, "lora_layers": [list(LAYERS)], "augment": "none"}
    on_base |= {"cache_embeddings": str(folder / name / "embeddings")}
    rows = []
    for network in (False, True):
        chosen = [system for system in systems if system_row(system).network == network]
        if chosen:
            config = CompareConfig(
                data=str(data),
                output=str(folder / name / ("networks" if network else "on_base")),
                folds=FOLDS,
                set=common if network else common | on_base,
                max_seconds=seconds + encoding * network,
                pictures=0,
            )
            compare(chosen, config)
            with open(Path(config.output) / "summary.csv", newline="", encoding="utf-8") as file:
                rows += csv.DictReader(file)
    return {"slices": slices, "encoding_seconds_of_a_run": round(encoding, 1), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "family")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--systems", nargs="+", help="instead of each set's own")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--folder", type=Path, help="where data and runs go, and are kept (default: nowhere)")
    parser.add_argument("--add", action="store_true", help="to the record in --output")
    args = parser.parse_args(arguments)
    config = {"seconds": args.seconds, "folds": FOLDS, "size": 256, "batch": BATCH, "threads": torch.get_num_threads()}
    record = heading("systems compared at equal wall-clock, held-out folds", CPU, config)
    record["sets"] = json.loads(args.output.read_text(encoding="utf-8"))["sets"] if args.add else {}
    with tempfile.TemporaryDirectory() as folder:
        place = args.folder or Path(folder)
        for name in args.sets:
            record["sets"][name] = measure(name, args.systems or SETS[name], args.data, place, args.seconds)
    write_record(record, args.output)


if __name__ == "__main__":
    main()
