"""What clicks and boxes are worth: every system with prompts, trained alike and measured alike, with and without them.

`vit_ti` from the demo base, which is small and has seen drawn shapes only; 256 px; the same steps, batch and slices for
every system, its own way of drawing prompts. Two sets: ultrasound of nerves and vessels (41 pictures to train on, 8 to
test), and CT, from one patient to another (see real_ct.py). `samed`, which takes no prompts, is trained beside them:
one model for both ways of answering should not answer worse without prompts than one for that way alone.

    python benchmarks/prompts.py --data FOLDER [--sets ultrasound ct] [--systems NAME ...] [--steps 100] [--seeds 0 1 2]

FOLDER holds ultrasound/, ct_abdomen/ and dicom_ct/ (see the project's tests). Seeds after the first are for the systems
that answer without prompts. Adapters that --folder holds are not trained again. Writes benchmarks/results/prompts.json.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from real_ct import prepare_patients
from timing import ROOT, heading, options, write_record

from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.files import shipped
from samlora.model.methods import SYSTEMS, system_row
from samlora.training.config import TrainConfig
from samlora.training.loop import train

BATCH = 4
PICTURES = Recipe(
    name="nerves_vessels", modality="image", size=256, classes=("nerve", "vessel"), label_values=((1,), (2,))
)
CLICKS = (1, 3, 5)


def prepared(name: str, data: Path, folder: Path) -> Path:
    """One of the two sets in SAMed's layout: its folder."""
    if name == "ct":
        return prepare_patients(data, folder / name)
    prepare(data / "ultrasound" / "nerves_vessels", folder / name / "data", PICTURES, workers=1)
    return folder / name / "data"


def adapt(system: str, data: Path, folder: Path, steps: int, seed: int) -> tuple[Path, float]:
    """Trains a system once; returns its adapter and the process's seconds of computing."""
    done = folder / "seconds.txt"
    if not done.is_file():
        epochs = -(-steps * BATCH // len(list((data / "train_npz").iterdir())))
        config = TrainConfig(
            root_path=str(data),
            output=str(folder),
            dataset="prompts",
            system=system,
            vit_name="vit_ti",
            batch_size=BATCH,
            max_epochs=epochs,
            stop_epoch=epochs,
            max_iterations=steps,
            base_lr=2e-3 if system_row(system).lora else 5e-4,
            warmup_period=steps // 5,
            save_interval=epochs,
            save_seconds=0,
            seed=seed,
            options={"freeze": ["prompt_encoder"]} if system == "sam_prompt" else {},
        )
        began = time.process_time()
        train(config)
        done.write_text(f"{time.process_time() - began:.1f}\n")
    return next(folder.rglob("adapter_last.safetensors")), float(done.read_text())
