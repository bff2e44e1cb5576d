"""What samlora does, from nothing: masks by boxes, an adapter for automatic segmentation, a page for own scans."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

from samlora.data.phantom import BTCV_IDS, ORGANS, write_cases
from samlora.data.prepare import prepare
from samlora.evaluation.folders import evaluate_folders
from samlora.inference.config import PredictConfig, TestConfig
from samlora.inference.predict import predict
from samlora.inference.testing import test
from samlora.model.bases import BASES, is_available
from samlora.options import make, read_yaml
from samlora.training.config import TrainConfig
from samlora.training.loop import train

CASES = 8  # two to test on, one to validate on, five to learn from
TEST_CASES = (1, 2)
SHAPE = (128, 128, 24)
SPACING = (2.8, 2.8, 8.0)  # mm
RECORD = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "zero_shot.json"
SYNTHETIC = (
    "These patients are synthetic: the figures show that the tool works, and say nothing about medicine."
)


def demo(output: Path, seed: int) -> Path:
    """Runs both parts on synthetic patients in `output` and returns that folder.

    First masks by boxes without any training, then an adapter that segments without prompts: prepare, train, test.
    A folder that is there already is left as it is; the next free name is taken instead.
    """
    began = time.monotonic()
    output = _free(output)
    patients, boxes, data = output / "patients", output / "boxes", output / "data"
    say_base()
    print(f"\n1/5 {CASES} synthetic abdomens (CT in HU, eight organs, NIfTI) in {patients}", flush=True)
    write_cases(patients, CASES, seed=seed, shape=SHAPE, spacing=SPACING)
    segment_by_boxes(patients, boxes)

    names = [f"case{number:04d}" for number in TEST_CASES]
    _step(3, f"samlora prepare {patients} -o {data} --dataset demo_abdomen --test_cases {' '.join(names)}")
    print(prepare(patients, data, "demo_abdomen", test_cases=names))

    config = "demo" if is_available("lite_medsam") else "demo_vit_ti"
    _step(4, f"samlora train --config {config} --root_path {data} --output {output / 'run'}")
    values = read_yaml(config) | {"root_path": str(data), "output": str(output / "run"), "seed": seed}
    if values["augment"] == "none":
        values["cache_embeddings"] = str(output / "cache")
    run = train(make(TrainConfig, values))

    result = output / "result"
    adapter = run / "adapter_best.safetensors"
    _step(5, f"samlora test --volume_path {data} --lora_ckpt {adapter} --output_dir {result} --is_savenii")
    options = {
        "volume_path": str(data),
        "lora_ckpt": str(adapter),
        "output_dir": str(result),
        "is_savenii": True,
    }
    test(replace(make(TestConfig, options), dataset="demo", precision=values["precision"]))

    print(f"\ndone in {time.monotonic() - began:.0f} s. Look at:")
    for path, what in (
        (boxes / "result" / "report.html", "part 1, by boxes: tables, and the patients slice by slice; for a browser"),
        (boxes / "masks" / "overlays", "the same as pictures"),
        (result / "report.html", "part 2, automatic: tables, plots, and the patients slice by slice"),
        (result / "overlays", "the organs found (filled) and their true outlines"),
        (result / "predictions", "the same as NIfTI, on the grid of the patients: for ITK-SNAP or 3D Slicer"),
        (run / "curves.png", "loss, learning rate and validation Dice"),
        (adapter, f"all that was trained, {adapter.stat().st_size / 1e6:.1f} MB"),
    ):
        print(f"  {path}: {what}")
    print(SYNTHETIC)
    print(real_figures())
    print("Your own CT or MR: samlora demo --scan PATH")
    return output


def segment_by_boxes(patients: Path, output: Path) -> None:
    """Part 1: masks of the test patients by boxes around each organ on each slice, from the reference labels."""
    images = [patients / "img" / f"img{number:04d}.nii.gz" for number in TEST_CASES]
    reference = output / "reference"
    reference.mkdir(parents=True)
    for number in TEST_CASES:
        shutil.copy(patients / "label" / f"label{number:04d}.nii.gz", reference)
    names = dict(zip(BTCV_IDS, ORGANS))
    (reference / "labels.json").write_text(json.dumps(names))
    shown = " ".join(map(str, images))
    _step(2, f"samlora predict {shown} -o {output / 'masks'} --boxes_from {reference} --overlay png")
    options = {"output": str(output / "masks"), "boxes_from": str(reference), "overlay": "png", "precision": "auto"}
    predict(images, make(PredictConfig, options))
    print(f"\nsamlora evaluate {output / 'masks'} {reference} -o {output / 'result'}", flush=True)
    print(evaluate_folders(output / "masks", reference, output / "result", names=names, images=patients / "img"))


def show(scan: Path) -> None:
    """Part 1 on an image of one's own: opens it in the page, with boxes by mouse. Returns when the page is ended.

    Raises what `samlora.app.server.serve` raises for an image that cannot be opened.
    """
    from samlora.app.config import AppConfig
    from samlora.app.server import serve

    say_base()
    print(real_figures())
    print("Drag a box around an organ or a lesion; then Shift+P carries the mask through the volume.\n")
    serve(str(scan), AppConfig(port=0, precision="auto", open=True))


def say_base() -> None:
    """Prints which base the demo starts from, and why if it is not LiteMedSAM."""
    if is_available("lite_medsam"):
        print("base: LiteMedSAM, trained by its authors on medical images of ten modalities with boxes")
    else:
        print(f"base: vit_ti, as LiteMedSAM is not installed. {BASES['vit_ti'].note}")


def real_figures() -> str:
    """What was measured with LiteMedSAM on a real CT, or where that is written."""
    if not RECORD.is_file():
        return "Figures on real images: benchmarks/results/zero_shot.json in samlora's repository"
    name = "CT, 512 px"
    dice = json.loads(RECORD.read_text(encoding="utf-8"))["sets"][name]["dice"]["tight box"]
    listed = ", ".join(f"{structure} {value:.2f}" for structure, value in dice.items())
    return f"LiteMedSAM on a real patient ({name}; boxes from the reference, no training), Dice: {listed} ({RECORD})"


def _step(number: int, command: str) -> None:
    print(f"\n{number}/5 {command}", flush=True)


def _free(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3, ... where it exists already."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
