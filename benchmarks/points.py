"""Which points to give: chosen by chance, where the model is least sure, far from those before, or from the centre.

As in the study of SAMUS (arXiv 2309.06824), Dice after the first, the second and the third point. On pictures of nerves
and vessels by LiteMedSAM as it is, which was trained with boxes alone, and by `sam_prompt` on it, as prompts.py trained
it, with boxes and points; on hip X-rays by LiteMedSAM as it is, there also with points of the scribbles that people
drew (MedScribble).

    python benchmarks/points.py --data FOLDER [--seeds 2] [--folder runs/prompts]

FOLDER holds ultrasound/ and xray/ (see the project's tests). Points are on the object, but those where the model is
least sure may lie beside it and say so. Writes benchmarks/results/points.json.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from prompts import BASE, CPU, MIN_PIXELS, adapt, prepared
from timing import ROOT, heading, options, write_record

from samlora.data.dataset import find_volumes
from samlora.data.frame import Frame
from samlora.data.prompts import STRATEGIES, objects, random_points, sample_points, uncertain_points
from samlora.data.volume import read_case
from samlora.inference.predictor import Predictor
from samlora.inference.prompt_study import dice_of
from samlora.model.bases import find_base

POINTS = 3
APART = 10  # pixels of the image that points where the model is least sure keep from each other


def after_points(predictor: Predictor, truth: np.ndarray, strategy: str, seed: int, strokes=None) -> list[float]:
    """Dice after 1, 2 and 3 points on the current slice. truth, strokes: (H, W) bool, where points may lie."""
    random = np.random.default_rng(seed)
    if strategy == "entropy":
        return _where_unsure(predictor, truth, random)
    if strategy == "scribble":
        points, labels = random_points(strokes, POINTS, random), np.ones(POINTS, np.int64)
    elif strategy == "random":  # the first alone, so that it is the first of the other strategies too
        points = np.concatenate([random_points(truth, 1, random), random_points(truth, POINTS - 1, random)])
        labels = np.ones(POINTS, np.int64)
    else:
        points, labels = sample_points(truth, POINTS, 0, strategy, random)
    return [_dice(predictor, points[:count], labels[:count], truth) for count in range(1, POINTS + 1)]


def _where_unsure(predictor: Predictor, truth: np.ndarray, random: np.random.Generator) -> list[float]:
    """The first point by chance, each further one where the answer to those before is closest to 0.5."""
    points, labels, dices = random_points(truth, 1, random), np.ones(1, np.int64), []
    frame = Frame(
        *truth.shape,
        predictor.model.image_size,
        predictor.model.pixels,
        None if predictor.recipe is None else predictor.recipe.size,
        predictor.model.logit_side,
    )
    for _ in range(POINTS):
        answer = predictor.predict(points, labels)
        dices.append(float(dice_of(answer.masks[0], truth)))
        probability = frame.logits(torch.from_numpy(answer.logits))[0].sigmoid().numpy()
        near = uncertain_points(probability, POINTS + 1, random, apart=APART)
        # The least sure place is often the same as before; a person would not click there twice.
        far = [p for p in near if (np.abs(points - p).max(axis=1) > APART).all()]
        col, row = (far or near)[0].astype(int)
        points = np.concatenate([points, [[col, row]]])
        labels = np.append(labels, int(truth[row, col]))
    return dices


def _dice(predictor: Predictor, points: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> float:
    return float(dice_of(predictor.predict(points, labels).masks[0], truth))


def summary(dices: Sequence[Sequence[float]]) -> dict:
    """Mean Dice after each number of points, and how many objects and seeds are in it."""
    return {"dice_after_points": np.mean(dices, axis=0).round(4).tolist(), "n": len(dices)}


def ultrasound(predictor: Predictor, data: Path, seeds: int) -> dict[str, dict]:
    """Per strategy, over the classes of all test pictures and the seeds."""
    found: dict[str, list] = {strategy: [] for strategy in STRATEGIES}
    for path in find_volumes(data):
        case = read_case(path)
        predictor.set_image(case, 0)
        for _, truth in objects(case.label[0], MIN_PIXELS, parts=False):
            for strategy in found:
                found[strategy] += [after_points(predictor, truth, strategy, seed) for seed in range(seeds)]
    return {strategy: summary(dices) for strategy, dices in found.items()}


def hips(predictor: Predictor, folder: Path, seeds: int) -> dict[str, dict]:
    """Per strategy, and by points of the strokes that people drew on the femur, over all X-rays and the seeds."""
    found: dict[str, list] = {strategy: [] for strategy in (*STRATEGIES, "scribble")}
    for path in sorted(folder.rglob("img.npy")):
        read = {name: np.load(path.with_name(f"{name}.npy"), allow_pickle=False) for name in ("seg", "scribble_0")}
        predictor.set_image(np.load(path, allow_pickle=False))
        truth = read["seg"] > 0.5
        strokes = (read["scribble_0"][0] > 0.5) & truth
        for strategy in found:
            found[strategy] += [after_points(predictor, truth, strategy, seed, strokes) for seed in range(seeds)]
    return {strategy: summary(dices) for strategy, dices in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "points")
    parser.add_argument("--data", type=Path, default=os.environ.get("SAMLORA_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--folder", type=Path, default=Path("runs/prompts"), help="where prompts.py left its runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    config = {name: getattr(args, name) for name in ("seeds", "steps", "threads")} | {"pixels_apart": APART}
    what = "Dice after 1, 2 and 3 points by the way they are chosen, LiteMedSAM, 256 px"
    record = heading(what, CPU, config)
    data, base = prepared("ultrasound", args.data, args.folder), str(find_base(BASE))
    adapter, _ = adapt("sam_prompt", data, args.folder / "ultrasound" / "sam_prompt_0", args.steps, 0)
    record["results"] = {
        "ultrasound, sam_prompt": ultrasound(Predictor.load(adapter, base), data, args.seeds),
        "ultrasound, the base as it is": ultrasound(Predictor.load(None, base), data, args.seeds),
        "hip X-rays, the base as it is": hips(Predictor.load(None, base), args.data / "xray" / "hip", args.seeds),
    }
    write_record(record, args.output)
    for name, of_set in record["results"].items():
        for strategy, figures in of_set.items():
            print(f"{name}, {strategy}: {figures['dice_after_points']}")


if __name__ == "__main__":
    main()
