"""HD95, and Dice with HD95 as SAMed computes them: samlora against MedPy, on a whole CT with eight organs.

Two label maps of 148 x 512 x 512 (3 x 0.75 x 0.75 mm), drawn: ellipsoids of the sizes of organs with rough surfaces,
moved and rescaled in the prediction, one with an island far away. Both libraries run in this process, in turn, on the
same arrays; equal values are asserted. Small inputs, where a fixed cost decides, are measured too.

    taskset -c 1 python benchmarks/metrics.py       (one core: about four minutes, nearly all of it MedPy)

Writes benchmarks/results/metrics.json.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from medpy.metric import binary
from plain import samed_measures
from scipy.ndimage import gaussian_filter, zoom
from timing import figures, heading, options, timed, write_record

from samlora.evaluation.metrics import evaluate, surface_distances

SHAPE, SPACING = (148, 512, 512), (3.0, 0.75, 0.75)
# Centre and half axes (slice, row, column), as shares of the volume and in mm; volumes like those of organs.
ORGANS = {
    "spleen": ((0.55, 0.55, 0.75), (50, 35, 28)),
    "right_kidney": ((0.42, 0.62, 0.33), (55, 28, 25)),
    "left_kidney": ((0.45, 0.62, 0.66), (55, 28, 25)),
    "gallbladder": ((0.45, 0.38, 0.38), (30, 14, 14)),
    "liver": ((0.6, 0.42, 0.32), (80, 70, 68)),
    "stomach": ((0.65, 0.36, 0.62), (50, 42, 45)),
    "aorta": ((0.5, 0.58, 0.52), (190, 10, 10)),
    "pancreas": ((0.48, 0.46, 0.5), (18, 14, 60)),
}


SAMED_ORGANS = ("spleen", "gallbladder", "liver", "pancreas")  # the same work; four of them say as much as eight


def draw(shape: Sequence[int], spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(prediction, reference), uint8 label maps; labels number ORGANS from 1. Always the same."""
    rng = np.random.default_rng(0)
    coarse = [max(4, size // 8) for size in shape]
    maps = []
    for found in (True, False):
        labels = np.zeros(shape, np.uint8)
        noise = gaussian_filter(rng.standard_normal(coarse), 1)
        rough = zoom((noise / noise.std()).astype(np.float32), np.divide(shape, coarse), order=1) * 0.06
        for label, (place, axes) in enumerate(ORGANS.values(), start=1):
            centre = np.multiply(place, shape)
            half = np.divide(axes, spacing) * np.divide(shape, SHAPE)
            if found:
                centre, half = centre + rng.normal(0, 1.5, 3), half * rng.normal(0.98, 0.03, 3)
            grid = np.ogrid[tuple(slice(size) for size in shape)]
            distance = sum(((g - c) / h) ** 2 for g, c, h in zip(grid, centre, half))
            labels[(distance + rough < 1) & (labels == 0)] = label
        if found:
            labels[: shape[0] // 30 + 1, : shape[1] // 30, : shape[2] // 30] = len(ORGANS)
        maps.append(labels)
    return maps[0], maps[1]


def compare(ours: Callable, theirs: Callable, pair: tuple, repeats: int, their_repeats: int) -> dict:
    """Both on the same arrays, in turn; raises AssertionError unless their values are equal to 1e-9."""
    seconds: dict[str, list[float]] = {"samlora": [], "medpy": []}
    for turn in range(max(repeats, their_repeats)):
        results = []
        for name, function, times in (("samlora", ours, repeats), ("medpy", theirs, their_repeats)):
            if turn < times:
                took, result = timed(function, *pair)
                seconds[name].append(took)
                results.append(result)
        if len(results) == 2:
            np.testing.assert_allclose(*results, rtol=0, atol=1e-9)
    result = {name: figures(times) for name, times in seconds.items()}
    result["ratio_of_medians"] = round(result["medpy"]["median"] / result["samlora"]["median"], 2)
    result["value"] = np.round(np.ravel(results[0] if len(results) == 1 else results[-1]), 6).tolist()
    return result


def whole_volume(shape: Sequence[int], repeats: int) -> dict:
    """Organs one by one: hd95 in mm, and Dice with HD95 in voxels as SAMed's test.py does it."""
    prediction, reference = draw(shape, SPACING)
    result: dict[str, dict] = {"hd95": {}, "dice_and_hd95_as_samed": {}}
    for label, organ in enumerate(ORGANS, start=1):
        pair = prediction == label, reference == label
        result["hd95"][organ] = compare(
            lambda p, r: surface_distances(p, r, SPACING).hd95(),
            lambda p, r: binary.hd95(p, r, SPACING),
            pair,
            repeats,
            1,
        )
        result["hd95"][organ]["voxels"] = int(pair[1].sum())
        if organ in SAMED_ORGANS:
            result["dice_and_hd95_as_samed"][organ] = compare(
                lambda p, r: tuple(evaluate(p, r, SPACING, policy="samed")[1].values()),
                samed_measures,
                pair,
                repeats,
                1,
            )
    for measures, organs in result.items():
        total = {who: sum(of[who]["median"] for of in organs.values()) for who in ("samlora", "medpy")}
        ratios = [of["ratio_of_medians"] for of in organs.values()]
        result[measures] = {
            "organs": organs,
            "seconds_of_all": total,
            "ratio_of_all": round(total["medpy"] / total["samlora"], 2),
            "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios),
        }
    seconds, _ = timed(evaluate, prediction, reference, SPACING, list(range(1, 9)))
    result["everything_of_all_organs"] = {
        "what": "evaluate(): all measures of the policy strict, eight organs in one call; MedPy was not timed on this",
        "samlora_seconds": seconds,
    }
    return result


def small_inputs(repeats: int) -> dict:
    """hd95 where the arrays or the masks are small or ragged."""
    rng = np.random.default_rng(1)
    pairs = {}
    for name, shape, share in (
        ("one voxel each in 16 x 16 x 16", (16, 16, 16), None),
        ("noise, half of 16 x 16 x 16", (16, 16, 16), 0.5),
        ("noise, half of 64 x 64 x 64", (64, 64, 64), 0.5),
        ("a disc in a slice of 512 x 512", (512, 512), None),
        ("three voxels each in 148 x 512 x 512", SHAPE, None),
    ):
        masks = np.zeros((2, *shape), bool)
        if share is not None:
            masks = rng.random(masks.shape) < share
        elif len(shape) == 2:
            y, x = np.ogrid[:512, :512]
            masks[0], masks[1] = (y - 250) ** 2 + (x - 250) ** 2 < 3600, (y - 255) ** 2 + (x - 248) ** 2 < 3500
        elif shape == SHAPE:
            masks[0, 70, 200, 200:203] = masks[1, 71, 210, 200:203] = True
        else:
            masks[0, 3, 3, 3] = masks[1, 9, 9, 12] = True
        pairs[name] = masks
    result = {}
    for name, masks in pairs.items():
        step = SPACING[-masks[0].ndim :]
        times = repeats if masks[0].size < 1e7 else 1
        result[name] = compare(
            lambda p, r, step=step: surface_distances(p, r, step).hd95(),
            lambda p, r, step=step: binary.hd95(p, r, step),
            tuple(masks),
            repeats,
            times,
        )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "metrics")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    parser.add_argument("--repeats", type=int, default=3, help="of samlora on whole volumes; MedPy runs once")
    args = parser.parse_args(arguments)
    what = "seconds per organ, samlora and MedPy in turn in one process; values equal to 1e-9 (asserted)"
    config = {"shape": list(args.shape), "spacing_mm": list(SPACING), "repeats": args.repeats}
    record = heading(what, torch.device("cpu"), config, ("samlora", "MedPy", "numpy", "scipy"))
    record |= {"whole_volume": whole_volume(args.shape, args.repeats), "small_inputs": small_inputs(20)}
    write_record(record, args.output)
    for measures in ("hd95", "dice_and_hd95_as_samed"):
        found = record["whole_volume"][measures]
        seconds = found["seconds_of_all"]
        print(
            f"{measures}, {len(found['organs'])} organs: samlora {seconds['samlora']:.2f} s, "
            f"MedPy {seconds['medpy']:.1f} s, "
            f"{found['ratio_of_all']:.0f} times ({found['lowest_ratio']:.0f} to {found['highest_ratio']:.0f})"
        )
    for name, found in record["small_inputs"].items():
        print(f"{name}: {1e3 * found['samlora']['median']:.2f} ms, {found['ratio_of_medians']} times as fast")


if __name__ == "__main__":
    main()
