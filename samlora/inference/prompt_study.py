"""`samlora evaluate-prompts`: how good masks are after so many clicks, and by boxes drawn so wide of the object.

Clicks are simulated: each goes to the middle of the largest region of error, as the evaluation of interactive
segmentation has done since Xu et al. (arXiv 1603.04042).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samlora.data.grid import Case
from samlora.errors import InputError, MissingFileError
from samlora.evaluation import prompt_figures as figures
from samlora.evaluation.prompt_figures import Asked
from samlora.options import option

if TYPE_CHECKING:
    from samlora.inference.predictor import Predictor
    from samlora.model.checkpoint import Spec


@dataclass(frozen=True)
class PromptStudyConfig:
    """All of a study but its data. What the adapter file knows need not be given."""

    output: str | None = option(None, "folder for the tables and the curve")
    adapter: str | None = option(None, "the adapter to measure (default: none, the base as it is)")
    ckpt: str | None = option(
        None, "base weights (default: those of the adapter's variant; without an adapter LiteMedSAM)"
    )
    list_dir: str | None = option(None, "folder with test_vol.txt, the cases to measure; without it all of them")
    clicks: tuple[int, ...] = option((1, 2, 3, 5, 10), "after how many clicks (default: 1 2 3 5 10)")
    boxes: tuple[int, ...] = option(
        (0, 5, 10, 20),
        "by how many pixels of the slice, at most, each side of a box is moved outwards (default: 0 5 10 20)",
    )
    targets: tuple[float, ...] = option((0.85, 0.9), "Dice to which clicks are counted (default: 0.85 0.9)")
    min_pixels: int = option(50, "classes with fewer pixels on a slice are not asked for there")
    max_slices: int | None = option(None, "slices of a case, spread evenly over those that show a class (default: all)")
    mask_prompt: bool | None = option(
        None,
        "give the answer before to the model with the next click, as SAM was trained (default: yes, but for bases "
        "that have not learned it: the demo base, MedSAM)",
    )
    image_size: int | None = option(None, "side of the model's input (default: the adapter's own, or the base's)")
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda", "mps"))
    precision: str = option(
        "fp32",
        "number format of the image encoder; auto is bf16 where the device is fast at it",
        ("fp32", "bf16", "fp16", "auto"),
    )
    seed: int = option(1234, "seed of the boxes")

    def __post_init__(self) -> None:
        if not self.output:
            raise InputError("--output is missing; give the folder for the tables: -o FOLDER")
        for name in ("clicks", "boxes", "targets"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "clicks" and not values):
                raise InputError(f"--{name} {' '.join(map(str, values)) or '(nothing)'}: give different numbers")
            object.__setattr__(self, name, tuple(sorted(values)))
        lowest = {"clicks": min(self.clicks), "min_pixels": self.min_pixels, "max_slices": self.max_slices}
        for name, value in lowest.items():
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is not possible; give 1 or more")
        if self.boxes and self.boxes[0] < 0:
            raise InputError(f"--boxes {self.boxes[0]} is not possible; give 0 or more pixels")
        for target in self.targets:
            if not 0 < target <= 1:
                raise InputError(f"--targets {target} is not possible; give Dice above 0, up to 1")


def evaluate_prompts(data: str | Path, config: PromptStudyConfig) -> dict:
    """Measures every test volume in `data` (samlora prepare makes them); returns `prompt_figures.summarise`.

    Every class of a slice is an object. Systems that answer without prompts are measured so too, on the same objects:
    what they draw where a class is not does not count here, as it does in `samlora test`. Writes prompts.csv,
    summary.json, curve.png and log.txt into `output`. Raises MissingFileError, or InputError for files and
    options that do not fit together, and where no slice shows anything to ask for.
    """
    from samlora.data.dataset import find_volumes
    from samlora.device import device_name
    from samlora.journal import Journal
    from samlora.model.bases import known_base

    if not Path(data).is_dir():
        raise MissingFileError(f"{data}: there is no such folder; make it with: samlora prepare SRC -o {data}")
    paths = find_volumes(data, config.list_dir)
    predictor, names = _predictor(paths[0], config)
    spec, out = predictor.model.spec, Path(config.output)
    journal = Journal(out, f"--output {out}")
    who = config.adapter or "no adapter"
    journal.say(f"{spec.system} on {spec.variant}, base {spec.base}, {spec.image_size} px: {who}")
    known = known_base(spec.base)
    if config.adapter is None and known is not None and known.note:
        journal.say(known.note)
    goes_on = _goes_on(predictor, config)
    journal.say(
        f"{len(paths)} volumes in {data}, device {device_name(predictor.device)}; the answer before "
        f"{'goes' if goes_on else 'does not go'} in with the next click"
    )
    asked: list[Asked] = []
    for path in _progress(paths):
        asked += measure_case(predictor, labelled(path, config.adapter, spec), config)
    if not asked:
        raise InputError(f"{data}: no slice shows {config.min_pixels} pixels of a class; lower --min_pixels")
    summary = figures.summarise(asked, names, config.clicks, config.targets)
    about = {
        "adapter": config.adapter,
        "data": str(data),
        "system": spec.system,
        "variant": spec.variant,
        "base": spec.base,
        "image_size": spec.image_size,
        "mask_prompt": goes_on,
        "min_pixels": config.min_pixels,
        "max_slices": config.max_slices,
        "seed": config.seed,
        "boxes": "each side moved outwards by 0 to so many pixels of the slice",
        "samlora": spec.samlora_version,
    }
    figures.write_csv(out / "prompts.csv", asked, names)
    figures.write_json(out / "summary.json", summary, about)
    written = "prompts.csv, summary.json, log.txt"
    if predictor.row.promptable:
        figures.draw_curve(out / "curve.png", asked, names)
        written += ", curve.png"
    for line in figures.table(summary).splitlines():
        journal.say(line)
    journal.say(f"written to {out}: {written}")
    journal.close()
    return summary


def measure_case(predictor: "Predictor", case: Case, config: PromptStudyConfig) -> list[Asked]:
    """What a predictor answers on the slices of a case with a label, object by object."""
    from samlora.data.prompts import objects

    large = [
        index
        for index, label in enumerate(case.label)
        if label.any() and np.bincount(label.ravel())[1:].max() >= config.min_pixels
    ]
    if config.max_slices is not None and len(large) > config.max_slices:
        places = np.linspace(0, len(large) - 1, config.max_slices)
        large = [large[place] for place in np.unique(places.round().astype(int))]
    if not large:
        return []
    predictor.set_image(case, large[0])
    asked: list[Asked] = []
    for index in large:
        predictor.select(index)
        found = objects(case.label[index], config.min_pixels, parts=False)
        truths = np.stack([mask for _, mask in found])
        counted = True if case.ignored is None else ~case.ignored[index]
        shown = truths, [label for label, _ in found], case.name, config, counted
        for kind, amount, dices in _measured(predictor, *shown):
            asked += [
                Asked(case.name, index, label, int(mask.sum()), kind, amount, float(dice))
                for (label, mask), dice in zip(found, dices)
            ]
    return asked


def click_through(
    predictor: "Predictor",
    truths: np.ndarray,
    clicks: int,
    goes_on: bool,
    counted: np.ndarray | bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Clicks objects of the current slice, all of them in one call a turn, until they have `clicks` each.

    truths: (P, H, W) bool. goes_on: the logits of the answer before go in as mask prompt. Of a first click the best of
    three masks is taken, by the model's own score, as far as the decoder that has them was not trained on one alone: as
    `Predictor.click` does. An object whose mask is perfect gets no more clicks. counted: (H, W) bool, false where
    the label is ignored: masks are empty there, and nobody clicks there. Returns masks (clicks, P, H, W) bool,
    and how many clicks each object got, (P,).
    """
    from samlora.data.prompts import next_click

    masks, drawn = np.zeros_like(truths), []
    points: list[list[np.ndarray]] = [[] for _ in truths]
    labels: list[list[int]] = [[] for _ in truths]
    side = predictor.model.logit_side
    logits = np.zeros((len(truths), 1, side, side), np.float32)
    for turn in range(clicks):
        active = []
        for n, truth in enumerate(truths):
            click = next_click(truth, masks[n], points[n]) if len(points[n]) == turn else None
            if click is not None:
                points[n].append(click[0])
                labels[n].append(click[1])
                active.append(n)
        if active:
            answer = predictor.predict(
                np.array([points[n] for n in active]),
                np.array([labels[n] for n in active]),
                mask=logits[active] if goes_on and turn else None,
                multimask=predictor.knows_three and not turn,
            )
            best = range(len(active)), answer.scores.argmax(axis=1)
            masks[active] = answer.masks[best] & counted
            logits[active, 0] = answer.logits[best]
        drawn.append(masks.copy())
    return np.stack(drawn), np.array([len(of_object) for of_object in points])


def dice_of(masks: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Dice (...) of masks (..., H, W) bool against truths that are not empty."""
    both = (masks & truths).sum(axis=(-2, -1))
    return 2 * both / (masks.sum(axis=(-2, -1)) + truths.sum(axis=(-2, -1)))


def labelled(path: Path, adapter: str | None, spec: "Spec") -> Case:
    """A volume with labels that can be asked for; InputError otherwise."""
    from samlora.data.volume import read_case
    from samlora.inference.testing import labelled_case

    if adapter is not None:
        return labelled_case(path, spec, adapter)
    case = read_case(path)  # SAM as it is knows no classes, so any will do
    if case.label is None or case.label.min() < 0:
        raise InputError(f"{path}: holds no label map from 0 up; prompts are drawn from labels")
    return case


def _measured(
    predictor: "Predictor",
    truths: np.ndarray,
    labels: Sequence[int],
    name: str,
    config: PromptStudyConfig,
    counted: np.ndarray | bool,
) -> list[tuple[str, int, np.ndarray]]:
    """(kind, amount, Dice (P,)) of every prompt on the current slice; counted: as of `click_through`."""
    from samlora.data.prompts import jittered_box

    found = []
    if predictor.row.automatic:
        drawn = predictor.classes()
        drawn = (drawn == np.array(labels)[:, None, None]) & counted
        found.append((figures.AUTOMATIC, 0, dice_of(drawn, truths)))
    if not predictor.row.promptable:
        return found
    turns, _ = click_through(
        predictor, truths, config.clicks[-1], _goes_on(predictor, config), counted
    )
    found += [(figures.CLICKS, turn, dice_of(masks, truths)) for turn, masks in enumerate(turns, start=1)]
    if config.boxes:
        # From the case and the slice alone, so that no answer depends on what else is measured.
        generator = np.random.default_rng([config.seed, zlib.crc32(name.encode()), predictor.index])
        boxes = [jittered_box(truth, pixels, generator) for pixels in config.boxes for truth in truths]
        answered = predictor.predict(box=predictor.whole_pixels(np.array(boxes))).masks[:, 0]
        masks = answered.reshape(len(config.boxes), *truths.shape) & counted
        found += [(figures.BOX, pixels, dice_of(of_box, truths)) for pixels, of_box in zip(config.boxes, masks)]
    return found


def _predictor(first: Path, config: PromptStudyConfig) -> tuple["Predictor", dict[int, str]]:
    """The model, with the recipe of its slices, and the names of the classes."""
    from samlora.data.recipe import Recipe
    from samlora.data.volume import read_case
    from samlora.device import DTYPES, exact_float32, pick_device, pick_precision
    from samlora.inference.predictor import Predictor
    from samlora.model.bases import default_base
    from samlora.model.checkpoint import read_adapter
    from samlora.model.methods import system_row

    spec = None if config.adapter is None else read_adapter(config.adapter)[1]
    if spec is not None and system_row(spec.system).network:
        raise InputError(f"{config.adapter}: the system {spec.system} takes no prompts; measure it with samlora test")
    stored = read_case(first).recipe
    recipe = None if stored is None else Recipe.from_dict(stored, str(first))
    own = spec is not None and spec.recipe is not None
    device = pick_device(config.device)
    exact_float32()
    precision = DTYPES[pick_precision(config.precision, device)]
    usual = default_base() if config.adapter is None else "default"
    predictor = Predictor.load(
        config.adapter, config.ckpt or usual, None if own else recipe, device, precision, config.image_size
    )
    classes = recipe.classes if spec is None and recipe is not None else predictor.model.spec.class_names
    return predictor, {} if spec is None and recipe is None else dict(enumerate(classes, start=1))


def _goes_on(predictor: "Predictor", config: PromptStudyConfig) -> bool:
    return predictor.takes_masks if config.mask_prompt is None else config.mask_prompt


def _progress(paths: Sequence[Path]):
    from tqdm import tqdm

    return tqdm(paths, desc="asking", unit="volume", dynamic_ncols=True, disable=None)
