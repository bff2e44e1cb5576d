"""How well a label map agrees with its reference: overlap, surface distances and volumes, per label.

Pure NumPy and SciPy. Every distance measure is a reading of one object, the distances between the two
surfaces, which is computed once per pair and only where the masks are.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from samlora.errors import InputError
from samlora.evaluation.bootstrap import mean_intervals, overall_interval

OVERLAP = ("dice", "iou", "precision", "recall", "specificity", "accuracy")
DISTANCES = ("hd", "hd95", "asd", "assd")
VOLUMES = ("volume_ml", "reference_ml", "volume_error_ml", "volume_error_percent")
METRICS = (*OVERLAP, *DISTANCES, "nsd", *VOLUMES)
POLICIES = ("strict", "samed")

LARGEST_LABEL = 65535
# Measured: a KD-tree costs about six times as much per surface voxel as the distance transform per voxel.
_VOXELS_PER_QUERY = 6


@dataclass(frozen=True)
class SurfaceDistances:
    """The distance from every surface voxel of one mask to the nearest surface voxel of the other.

    `to_reference` has one entry per surface voxel of the prediction, `to_prediction` one per surface voxel
    of the reference; both in the unit of the spacing. A surface voxel is a voxel of the mask with a face
    neighbour outside it, and what lies beyond the array is outside (MedPy's definition, connectivity 1).
    """

    to_reference: np.ndarray
    to_prediction: np.ndarray

    def hd(self) -> float:
        """The Hausdorff distance: the largest distance in either direction."""
        return float(max(self.to_reference.max(), self.to_prediction.max()))

    def hd95(self) -> float:
        """The 95th percentile of the distances of both directions together, as MedPy's hd95.

        MONAI and DeepMind's surface-distance take the larger of the two directions' percentiles instead.
        """
        return float(np.percentile(np.hstack((self.to_reference, self.to_prediction)), 95))

    def asd(self) -> float:
        """The mean distance from the prediction's surface to the reference's, as MedPy's asd."""
        return float(self.to_reference.mean())

    def assd(self) -> float:
        """The mean distance of both directions together, as MedPy's assd since version 0.5."""
        return float(np.hstack((self.to_reference, self.to_prediction)).mean())

    def nsd(self, tolerance: float) -> float:
        """Surface Dice: the fraction of both surfaces' voxels within `tolerance` of the other surface.

        Voxels count alike, as in MONAI's SurfaceDiceMetric and nnU-Net; DeepMind weights them by area.
        Formula: Nikolov et al., 2021, https://doi.org/10.2196/26151.
        """
        limit = tolerance * (1 + 1e-6)  # three steps of 0.1 mm are within 0.3 mm; headers hold float32
        within = np.count_nonzero(self.to_reference <= limit) + np.count_nonzero(self.to_prediction <= limit)
        return float(within / (self.to_reference.size + self.to_prediction.size))


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """Measures the distances between the surfaces of two masks, once, in both directions.

    prediction, reference: bool arrays of one shape, each with at least one voxel set.
    spacing: size of a voxel along each array axis; the distances come in the same unit.
    Raises InputError when the shapes differ, a mask is empty or the spacing does not fit.
    """
    prediction, reference = np.asarray(prediction, dtype=bool), np.asarray(reference, dtype=bool)
    _check_shapes(prediction, reference)
    step = _checked_spacing(spacing, prediction.ndim)
    boxes = [_bounding_boxes(mask.view(np.uint8)).get(1) for mask in (prediction, reference)]
    if None in boxes:
        raise InputError("a mask is empty; surface distances need at least one voxel in each of the two")
    box = _union(*boxes)
    return _surface_distances(prediction[box], reference[box], step)


def evaluate(
    pred: np.ndarray,
    gt: np.ndarray,
    spacing: Sequence[float],
    labels: Sequence[int] | None = None,
    policy: str = "strict",
    tolerance_mm: float = 2.0,
    distances: bool = True,
    tolerances_mm: Sequence[float] = (),
) -> dict[int, dict[str, float]]:
    """Compares a label map with its reference and returns the measures of every label.

    pred, gt: label maps of one shape, 2D or 3D, whole numbers in 0..65535 or bool; 0 is background.
    spacing: size of a voxel in mm along each array axis, in the order of the axes.
    labels: the labels to measure; default: those that occur in either map (1 for bool arrays).
    tolerance_mm: how far apart two surfaces may be and still agree in `nsd`. tolerances_mm: more of them, from
    the same distances: (1, 0.5) adds `nsd_1mm` and `nsd_0.5mm`.
    distances: False leaves hd, hd95, asd, assd and nsd out ("strict" only), which is much faster.

    policy "strict": all of METRICS. Distances are in mm, volumes in ml (NaN in 2D), the rest are fractions.
    `volume_error_ml` is prediction minus reference, `volume_error_percent` the same per 100 of the reference (NaN
    where that is empty). A label absent from both maps has no overlap and no distance: NaN, except for specificity,
    accuracy and volumes, which are defined. A label absent from one map: dice, iou, precision, recall and nsd are 0,
    distances are the diagonal of the whole array in mm.
    policy "samed": `dice` and `hd95` as the SAMed and TransUNet papers count them. In both: MedPy's dc, and
    hd95 in voxels; only in the prediction: 1 and 0; otherwise: 0 and 0. An absent label counts there, so
    pass `labels`.

    Raises InputError for shapes that differ, arrays that are not whole numbers, an unknown policy, and
    labels, spacing or a tolerance out of range. Dice, IoU, precision, recall and specificity are MedPy's.
    """
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
    for tolerance in (tolerance_mm, *tolerances_mm):
        if not isinstance(tolerance, int | float | np.number) or not (math.isfinite(tolerance) and tolerance >= 0):
            raise InputError(f"tolerance_mm is {tolerance}; it must be a finite number of mm, 0 or more")
    tolerances = {"nsd": tolerance_mm} | {f"nsd_{tolerance:g}mm": tolerance for tolerance in tolerances_mm}
    pred, gt = _as_array(pred, "prediction"), _as_array(gt, "reference")
    masks = pred.dtype.kind == gt.dtype.kind == "b"
    pred, gt = _label_map(pred, "prediction"), _label_map(gt, "reference")
    _check_shapes(pred, gt)
    if pred.ndim not in (2, 3):
        raise InputError(f"label maps have {pred.ndim} dimensions; only 2D and 3D can be measured")
    step = _checked_spacing(spacing, pred.ndim)
    boxes, reference_boxes = _bounding_boxes(pred), _bounding_boxes(gt)
    if labels is not None:
        wanted = _checked_labels(labels)
    else:
        wanted = [1] if masks else sorted(boxes.keys() | reference_boxes.keys())

    result = {}
    for label in wanted:
        found = [every[label] for every in (boxes, reference_boxes) if label in every]
        box = _union(*found) if found else (slice(0, 0),) * pred.ndim
        pair = pred[box] == label, gt[box] == label
        if policy == "samed":
            result[label] = _published(*pair)
        else:
            result[label] = _strict(*pair, pred.shape, step, tolerances if distances else None)
    return result


def evaluate_case(
    pred: np.ndarray,
    gt: np.ndarray,
    spacing: Sequence[float] | None,
    labels: Sequence[int] | None = None,
    tolerances: Sequence[float] = (2.0,),
    has_thickness: bool = True,
) -> dict[str, dict[int, dict[str, float]]]:
    """What `evaluate` says under every policy, for a volume (D, H, W) or a picture stored as one of one slice.

    A volume with an axis of length 1 is measured as the picture that it is: its outline, not its two faces, is the
    surface. spacing: as for `evaluate`; None where nothing is known about mm: distances and tolerances are then
    in pixels (`nsd_1px`), and there are no ml (NaN). tolerances: the first is that of `nsd`. has_thickness: False for a
    picture whose slice has none; there are no ml then either.
    Returns policy -> label -> measures. Raises InputError as `evaluate` does.
    """
    pred, gt = np.asarray(pred), np.asarray(gt)
    flat = tuple(axis for axis in range(pred.ndim) if pred.shape[axis] == 1)[: max(0, pred.ndim - 2)]
    step = (1.0,) * pred.ndim if spacing is None else tuple(spacing)
    first, *more = tolerances
    maps = (pred, gt) if pred.shape != gt.shape else (np.squeeze(pred, flat), np.squeeze(gt, flat))
    sides = tuple(s for axis, s in enumerate(step) if axis not in flat)
    strict = evaluate(*maps, sides, labels, "strict", first, tolerances_mm=more)
    if flat and spacing is not None and has_thickness:
        thick = evaluate(pred, gt, step, list(strict), distances=False)
        for label, values in strict.items():
            values |= {name: thick[label][name] for name in VOLUMES}
    if spacing is None:
        unit = {f"nsd_{tolerance:g}mm": f"nsd_{tolerance:g}px" for tolerance in more}
        strict = {label: {unit.get(k, k): v for k, v in values.items()} for label, values in strict.items()}
        for values in strict.values():
            values |= dict.fromkeys(VOLUMES[:3], math.nan)
    return {"strict": strict, "samed": evaluate(*maps, sides, list(strict), "samed")}


def summarise(cases: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict:
    """Means over cases: {"n_cases", "classes": {label: {metric: figures}}, "overall": {metric: figures}}.

    cases: what `evaluate` returned, per case. Figures are "mean", "sd", "median", "ci_low", "ci_high", "n" and
    "n_excluded". For a class: mean, sample standard deviation (n - 1), median and number of its defined values over
    cases, the 95 % bootstrap interval of that mean (`bootstrap.mean_intervals`), and how many values were left out:
    NaN, or the case has no such label. For "overall": the mean over classes of the class means (without exclusions
    that is the mean over cases of per-class means, the figure papers print), standard deviation and median over
    cases of each case's mean over classes, the interval of that overall mean when cases are drawn, and values
    counted over cases and classes. A mean of nothing, and a deviation or an interval of fewer than two values, are
    NaN.
    """
    labels = sorted({label for case in cases.values() for label in case})
    entries = [entry for case in cases.values() for entry in case.values()]
    metrics = list(dict.fromkeys(name for entry in entries for name in entry))
    classes: dict[int, dict] = {label: {} for label in labels}
    overall = {}
    for metric in metrics:
        values = np.array([[case.get(label, {}).get(metric, math.nan) for label in labels] for case in cases.values()])
        intervals = mean_intervals(values)
        for column, label in enumerate(labels):
            classes[label][metric] = _figures(values[:, column], intervals[:, column])
        means = np.array([_figures(row)["mean"] for row in values])
        overall[metric] = _figures(means, overall_interval(values)) | {
            "mean": _figures(np.array([classes[label][metric]["mean"] for label in labels]))["mean"],
            "n": int(np.count_nonzero(~np.isnan(values))),
            "n_excluded": int(np.count_nonzero(np.isnan(values))),
        }
    return {"n_cases": len(cases), "classes": classes, "overall": overall}


def _figures(values: np.ndarray, interval: Sequence[float] = (math.nan, math.nan)) -> dict[str, float]:
    defined = values[~np.isnan(values)]
    return {
        "mean": float(defined.mean()) if defined.size else math.nan,
        "sd": float(defined.std(ddof=1)) if defined.size > 1 else math.nan,
        "median": float(np.median(defined)) if defined.size else math.nan,
        "ci_low": float(interval[0]),
        "ci_high": float(interval[1]),
        "n": int(defined.size),
        "n_excluded": int(values.size - defined.size),
    }


def _strict(
    pred: np.ndarray,
    gt: np.ndarray,
    shape: tuple[int, ...],
    step: np.ndarray,
    tolerances: Mapping[str, float] | None,
) -> dict[str, float]:
    """All of METRICS of one label, from its masks in the box around both; shape is the whole array's.

    tolerances: name of a surface Dice -> mm. None leaves the measures of surfaces out.
    """
    size, reference_size = np.count_nonzero(pred), np.count_nonzero(gt)
    hit = np.count_nonzero(pred & gt)
    false_alarm, miss = size - hit, reference_size - hit
    total = math.prod(shape)
    rest = total - hit - false_alarm - miss
    nowhere = not (size or reference_size)

    def fraction(part: float, of: float) -> float:
        # With one mask empty the worst value stands: a missed organ must not drop out of a mean.
        return part / of if of else math.nan if nowhere else 0.0

    values = {
        "dice": fraction(2 * hit, size + reference_size),
        "iou": fraction(hit, size + miss),
        "precision": fraction(hit, size),
        "recall": fraction(hit, reference_size),
        "specificity": rest / (rest + false_alarm) if rest + false_alarm else math.nan,
        "accuracy": (hit + rest) / total,
    }
    if tolerances is None:
        pass
    elif size and reference_size:
        surfaces = _surface_distances(pred, gt, step)
        values |= {name: getattr(surfaces, name)() for name in DISTANCES}
        values |= {name: surfaces.nsd(tolerance) for name, tolerance in tolerances.items()}
    else:
        diagonal = math.nan if nowhere else float(np.linalg.norm(np.array(shape) * step))
        values |= dict.fromkeys(DISTANCES, diagonal)
        values |= dict.fromkeys(tolerances, math.nan if nowhere else 0.0)
    ml = float(np.prod(step)) / 1000 if len(shape) == 3 else math.nan
    percent = 100 * (size - reference_size) / reference_size if reference_size else math.nan
    volumes = size * ml, reference_size * ml, (size - reference_size) * ml, percent
    values |= zip(VOLUMES, volumes, strict=True)
    return {name: float(value) for name, value in values.items()}


def _published(pred: np.ndarray, gt: np.ndarray) -> dict[str, float]:
    """SAMed's calculate_metric_percase (github hitachinsk/SAMed, utils.py), which TransUNet began."""
    size, reference_size = np.count_nonzero(pred), np.count_nonzero(gt)
    if size and reference_size:
        dice = 2 * np.count_nonzero(pred & gt) / (size + reference_size)
        return {"dice": float(dice), "hd95": _surface_distances(pred, gt, np.ones(pred.ndim)).hd95()}
    return {"dice": 1.0 if size else 0.0, "hd95": 0.0}


def _surface_distances(pred: np.ndarray, gt: np.ndarray, step: np.ndarray) -> SurfaceDistances:
    """The distances between two non-empty masks that are already cropped to their common box."""
    surface, reference_surface = _surface(pred), _surface(gt)
    queries = np.count_nonzero(surface) + np.count_nonzero(reference_surface)
    if queries * _VOXELS_PER_QUERY > surface.size:  # tiny or ragged masks: transform the box
        from scipy.ndimage import distance_transform_edt

        return SurfaceDistances(
            distance_transform_edt(~reference_surface, sampling=step)[surface],
            distance_transform_edt(~surface, sampling=step)[reference_surface],
        )
    points, reference_points = np.argwhere(surface), np.argwhere(reference_surface)
    return SurfaceDistances(_nearest(points, reference_points, step), _nearest(reference_points, points, step))


def _surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask that have a face neighbour outside it, on the mask's grid padded by one."""
    mask = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(mask.ndim):
        to, of = np.moveaxis(inside, axis, 0), np.moveaxis(mask, axis, 0)
        to[1:] &= of[:-1]
        to[:-1] &= of[1:]
    return mask ^ inside


def _nearest(points: np.ndarray, targets: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The distance from each voxel index of (N, ndim) points to the nearest of (M, ndim) targets."""
    from scipy.spatial import KDTree

    # Points of a grid come sorted, with many equal coordinates: median splits only cost time.
    tree = KDTree(targets * step, leafsize=32, balanced_tree=False, compact_nodes=False)
    _, nearest = tree.query(points * step)
    # From whole index differences, so that the value depends neither on where the masks lie nor on the tree.
    return np.sqrt((((points - targets[nearest]) * step) ** 2).sum(axis=1))


def _bounding_boxes(labels: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """The box around every label > 0 that occurs, from one pass over the array."""
    from scipy.ndimage import find_objects

    return {label: box for label, box in enumerate(find_objects(labels), start=1) if box is not None}


def _union(*boxes: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )


def _as_array(array: object, name: str) -> np.ndarray:
    """What a caller gives, an array, nested lists or a tensor, as an array."""
    if isinstance(array, str | os.PathLike):
        raise InputError(f"{name} is a path; give an array, or measure files with: samlora evaluate")
    try:
        array = np.asarray(array)
    except (TypeError, ValueError, RuntimeError):
        kind = type(array).__name__
        raise InputError(f"{name} is of type {kind} and no array; give a NumPy array of whole numbers") from None
    return array


def _label_map(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == bool:
        return array.view(np.uint8)
    if array.dtype.kind not in "iu":
        raise InputError(
            f"{name} is an array of {array.dtype}; label maps hold whole numbers: use .astype(numpy.uint8)"
        )
    if array.size == 0:
        raise InputError(f"{name} has shape {array.shape} and so no voxels; there is nothing to measure")
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > LARGEST_LABEL:
            raise InputError(f"{name} holds values {low}..{high}; labels must be in 0..{LARGEST_LABEL}")
    return array


def _check_shapes(pred: np.ndarray, gt: np.ndarray) -> None:
    if pred.shape != gt.shape:
        raise InputError(f"prediction has shape {pred.shape}, reference {gt.shape}; they must be on one grid")


def _checked_labels(labels: Sequence[int]) -> list[int]:
    if isinstance(labels, str) or not hasattr(labels, "__iter__"):
        raise InputError(f"labels {labels!r}: a list of whole numbers, such as [1, 2], is needed")
    for label in labels:
        if not isinstance(label, (int, np.integer)) or not 1 <= label <= LARGEST_LABEL:
            raise InputError(f"label {label!r} cannot be measured; it must be in 1..{LARGEST_LABEL}")
    return [int(label) for label in labels]


def _checked_spacing(spacing: Sequence[float], ndim: int) -> np.ndarray:
    try:
        step = np.asarray(spacing, dtype=np.float64)
    except (TypeError, ValueError):
        step = np.array(np.nan)
    if step.shape != (ndim,) or not (np.isfinite(step) & (step > 0)).all():
        raise InputError(f"spacing is {spacing}; a {ndim}D array needs {ndim} positive numbers, one per axis")
    return step
