"""The main job from nothing to a table: synthetic patients, prepared, trained on, tested, shown."""

import time
from dataclasses import replace
from pathlib import Path

from samlora.data.phantom import write_cases
from samlora.data.prepare import prepare
from samlora.inference.config import TestConfig
from samlora.inference.testing import test
from samlora.options import make, read_yaml
from samlora.training.config import TrainConfig
from samlora.training.loop import train

CASES = 8  # two to test on, one to validate on, five to learn from
TEST_CASES = ("case0001", "case0002")


def demo(output: Path, seed: int) -> Path:
    """Runs the whole job on synthetic patients in `output` and returns that folder.

    A folder that is there already is left alone; the next free name is taken instead.
    """
    began = time.monotonic()
    output = _free(output)
    patients, data = output / "patients", output / "data"
    print(f"1/4 drawing {CASES} synthetic abdomens (CT in HU, eight organs, NIfTI) in {patients}", flush=True)
    write_cases(patients, CASES, seed=seed)

    _step(2, f"samlora prepare {patients} -o {data} --dataset synapse --test_cases {' '.join(TEST_CASES)}")
    print(prepare(patients, data, "synapse", test_cases=TEST_CASES))

    _step(3, f"python train.py --config demo --root_path {data} --output {output / 'run'}")
    values = read_yaml("demo") | {"root_path": str(data), "output": str(output / "run"), "seed": seed}
    run = train(make(TrainConfig, values))

    result = output / "result"
    adapter = run / "adapter_best.safetensors"
    _step(4, f"python test.py --volume_path {data} --lora_ckpt {adapter} --output_dir {result} --is_savenii")
    options = {
        "volume_path": str(data),
        "lora_ckpt": str(adapter),
        "output_dir": str(result),
        "is_savenii": True,
    }
    test(replace(make(TestConfig, options), dataset="demo", precision=values["precision"]))

    print(f"\ndone in {time.monotonic() - began:.0f} s. Look at:")
    for path, what in (
        (result / "overlays", "the organs found (filled) and their true outlines, slice by slice"),
        (
            result / "predictions",
            "the same as NIfTI, on the grid of the patients: open with ITK-SNAP or 3D Slicer",
        ),
        (result / "report.html", "the result as a page: tables, plots, the cases slice by slice; open it in a browser"),
        (result / "metrics.csv", "every measure per case and organ; summary.json has the means"),
        (run / "curves.png", "loss, learning rate and validation Dice"),
        (adapter, f"all that was trained, {adapter.stat().st_size / 1e6:.1f} MB"),
    ):
        print(f"  {path}: {what}")
    print("These patients are drawn, not real: the figures say that the tool works, nothing about medicine.")
    return output


def _step(number: int, command: str) -> None:
    print(f"\n{number}/4 {command}", flush=True)


def _free(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3, ... where it exists already."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
