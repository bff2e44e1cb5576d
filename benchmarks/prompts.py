"""What clicks and boxes are worth: every system with prompts, trained alike and measured alike, with and without them.

LiteMedSAM at 256 px as the base; the same steps, batch and slices for every system, its own way of sampling prompts;
LoRA in the last two attention blocks. Where the blocks below what trains are frozen, their output is computed once
(`--cache_embeddings`), so slices are not augmented, for any system. Two sets: ultrasound of nerves and vessels (41
pictures to train on, 8 to test), and CT, from one patient to another (see real_ct.py). `samed`, which takes no prompts,
is trained beside them: one model for both ways of answering should not answer worse without prompts than one for that
way alone. Left out: `msa` and `samus`, which change the blocks of a plain ViT and cannot run on LiteMedSAM's TinyViT;
`medsam`, which trains the complete encoder, so that nothing of it can be kept.

    python benchmarks/prompts.py --data FOLDER [--sets ultrasound ct] [--systems NAME ...] [--steps 40] [--seeds 0 1 2]

FOLDER holds ultrasound/, ct_abdomen/ and dicom_ct/ (see the project's tests). Seeds after the first are for the systems
that answer without prompts. Adapters that --folder holds are not trained again. Writes benchmarks/results/prompts.json;
with --add what else that record holds stays in it. Every run names its commit.
"""

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from real_ct import prepare_patients
from timing import ROOT, heading, options, write_record

from samlora.data.dataset import find_volumes
from samlora.data.prepare import prepare
from samlora.data.prompts import objects, tight_box
from samlora.data.recipe import Recipe
from samlora.data.volume import read_case
from samlora.device import DTYPES, pick_precision
from samlora.evaluation.prompt_figures import prompt_text
from samlora.inference.predictor import Predictor
from samlora.inference.prompt_study import PromptStudyConfig, evaluate_prompts
from samlora.model.bases import find_base
from samlora.model.methods import system_row
from samlora.training.config import TrainConfig
from samlora.training.loop import train
from samlora.training.run import commit
from samlora.training.setup import load_data

BASE = "lite_medsam"
LAYERS = (8, 9)  # attention blocks that get LoRA: the last stage of the TinyViT
BATCH = 4
CPU = torch.device("cpu")
# Of systems that learn masks without prompts, of LoRA under LiteMedSAM's own decoder, and of that decoder itself (the
# rate of LiteMedSAM's published fine-tuning).
RATES = {"automatic": 2e-3, "lora": 5e-4, "decoder": 5e-5}
JITTER = 5  # pixels by which boxes in training are too wide: MedSAM's 20 of 1024, and LiteMedSAM's own
PICTURES = Recipe(
    name="nerves_vessels", modality="image", size=256, classes=("nerve", "vessel"), label_values=((1,), (2,))
)
CLICKS, BOXES = (1, 3, 5), (0, 10)
MIN_PIXELS, MAX_SLICES = 50, 10  # of an object, and of a case
UNTOUCHED, WITHOUT_PROMPTS = "sam", "samed"
BOTH = ("samed", "samlora_joint")
SYSTEMS = (*BOTH, "sam_lora", "sam_prompt", "medsam_decoder")
SEEDS = {"ultrasound": (0, 1, 2), "ct": (0,)}  # of the systems that answer without prompts


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
        row = system_row(system)
        config = TrainConfig(
            root_path=str(data),
            output=str(folder),
            dataset="prompts",
            system=system,
            vit_name=BASE,
            lora_layers=LAYERS if row.lora else (),
            augment="none",
            cache_embeddings=str(folder.parent / "embeddings"),
            precision="auto",
            batch_size=BATCH,
            max_iterations=steps,
            base_lr=RATES["automatic" if row.automatic else "lora" if row.lora else "decoder"],
            warmup_period=steps // 5,
            save_seconds=0,
            seed=seed,
            box_jitter=JITTER if row.promptable else None,
        )
        # Systems that only answer prompts leave out the slices that show nothing.
        epochs = -(-steps // -(-len(load_data(config).train) // BATCH))
        config = replace(config, max_epochs=epochs, stop_epoch=epochs, save_interval=epochs)
        began = time.process_time()
        train(config)
        done.write_text(f"{time.process_time() - began:.1f}\n")
    return next(folder.rglob("adapter_last.safetensors")), float(done.read_text())


def measure(system: str, adapter: Path | None, data: Path, folder: Path) -> dict:
    """Dice by prompt over all classes, and how much two prompts on one slice change the answer."""
    base = str(find_base(BASE))
    config = PromptStudyConfig(
        output=str(folder),
        adapter=None if adapter is None else str(adapter),
        ckpt=base,
        clicks=CLICKS,
        boxes=BOXES,
        targets=(),
        min_pixels=MIN_PIXELS,
        max_slices=MAX_SLICES,
        device="cpu",
        precision="auto",
        mask_prompt=False,
    )
    summary = evaluate_prompts(data, config)
    figures = {"dice": {prompt_text(entry): entry["overall"] for entry in summary["dice"]}}
    figures["dice_of_classes"] = {
        prompt_text(entry): {name: of_class["mean"] for name, of_class in entry["classes"].items()}
        for entry in summary["dice"]
    }
    if system_row(system).promptable:
        predictor = Predictor.load(adapter, base, precision=DTYPES[pick_precision("auto", CPU)])
        figures["share_that_another_box_changes"] = changed_by_boxes(predictor, data)
    return figures


@torch.inference_mode()
def changed_by_boxes(predictor: Predictor, data: Path) -> float:
    """Mean over pairs of classes on a slice: of the pixels that either box's answer holds, the share in one alone.

    1 for answers that have nothing in common, as the classes have not; 0 where the model does not listen.
    """
    shares = []
    for path in find_volumes(data):
        case = read_case(path)
        predictor.set_image(case, 0)
        for index in np.unique(np.linspace(0, len(case.label) - 1, MAX_SLICES).round().astype(int)).tolist():
            truths = [mask for _, mask in objects(case.label[index], MIN_PIXELS, parts=False)]
            if len(truths) < 2:
                continue
            masks = predictor.predict(box=np.stack([tight_box(t) for t in truths]), index=index).masks[:, 0]
            for one, other in combinations(masks, 2):
                if (one | other).any():
                    shares.append(float((one ^ other).sum() / (one | other).sum()))
    return float(np.mean(shares))


def compared(of_set: dict[str, list[dict]]) -> dict | None:
    """Dice without prompts of the systems that answer both ways, minus that of samed, seed by seed."""
    alone = {run["seed"]: run["dice"]["no prompt"]["mean"] for run in of_set.get(WITHOUT_PROMPTS, ())}
    found = {}
    for system, runs in of_set.items():
        row = system_row(system)
        if row.automatic and row.promptable:
            by_seed = {run["seed"]: run["dice"]["no prompt"]["mean"] for run in runs}
            both = {seed: dice - alone[seed] for seed, dice in by_seed.items() if seed in alone}
            if both:
                found[system] = {"by_seed": both, "mean": statistics.mean(both.values())}
    return found or None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "prompts")
    parser.add_argument("--data", type=Path, default=os.environ.get("SAMLORA_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--folder", type=Path, default=Path("runs/prompts"), help="for prepared data, runs and tables")
    parser.add_argument("--sets", nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of those of SEEDS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="to the record in --output, made with the same options")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    config = {"steps": args.steps, "batch": BATCH, "side": 256, "threads": args.threads, "precision": "auto"}
    config |= {"lora_layers": list(LAYERS), "augment": "none"}
    config |= {"base_lr": RATES, "box_jitter": JITTER}
    config |= {"min_pixels": MIN_PIXELS, "slices_of_a_case_at_most": MAX_SLICES, "mask_prompt": False}
    record = heading(
        "Dice with and without prompts, LiteMedSAM trained on a few slices for a few steps",
        CPU,
        config,
    )
    former = json.loads(args.output.read_text(encoding="utf-8")) if args.add else {"results": {}, "config": config}
    if former["config"] != config:
        parser.error(f"--add: {args.output} was made with {former['config']}, not with {config}")
    record["results"] = former["results"]
    for name in args.sets:
        seeds = args.seeds or SEEDS[name]
        data, folder = prepared(name, args.data, args.folder), args.folder / name
        runs = record["results"].get(name, {}).get("systems", {})
        if UNTOUCHED not in runs:
            runs[UNTOUCHED] = [{"seed": None, "commit": commit()} | measure(UNTOUCHED, None, data, folder / "sam")]
        for system in args.systems:
            runs[system] = []
            for seed in seeds if system_row(system).automatic else seeds[:1]:
                own = folder / f"{system}_{seed}"
                adapter, seconds = adapt(system, data, own, args.steps, seed)
                figures = measure(system, adapter, data, own / "prompts")
                facts = {"seed": seed, "commit": commit(), "train_cpu_seconds": seconds}
                runs[system].append(facts | figures)
        record["results"][name] = {"systems": runs, "without_prompts_minus_samed": compared(runs)}
    trained = {system for of_set in record["results"].values() for system in of_set["systems"]} - {UNTOUCHED}
    record["prompts_in_training"] = {
        name: asdict(system_row(name).prompting) for name in sorted(trained) if system_row(name).promptable
    }
    write_record(record, args.output)
    for name, of_set in record["results"].items():
        for system, runs in of_set["systems"].items():
            for run in runs:
                dice = ", ".join(f"{prompt} {100 * value['mean']:.1f}" for prompt, value in run["dice"].items())
                print(f"{name} {system} seed {run['seed']}: Dice {dice}")


if __name__ == "__main__":
    main()
