"""Samples for other people's loops: pictures and masks as a prompted SAM takes them, one dictionary each.

After the names of github.com/MathieuNlp/Sam_LoRA, so that its users find what they know.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samlora.data.dataset import find_slices, read_recipe
from samlora.data.frame import Frame
from samlora.data.given import check_mask, check_picture, kind_of
from samlora.data.ignored import split_ignored
from samlora.data.layouts import Layout, find_pairs
from samlora.data.parts import drop_small_parts
from samlora.data.plan import plan
from samlora.data.plan_looks import SOFT
from samlora.data.prepare import wanted
from samlora.data.recipe import Recipe
from samlora.data.sources import read_image, read_label, resolve_classes
from samlora.errors import InputError, MissingFileError
from samlora.files import find_file
from samlora.inference.prompted import draw_prompt
from samlora.model.methods import system_row
from samlora.model.sam import Sam
from samlora.prompting import PROMPTS, Prompting


class Samprocessor:
    """Frames a picture for a model, and draws a prompt from a mask: the model's system says how.

    prompt: "no", "box", "full_box", "pt", "pt_box" or "any"; None for the system's own. Raises InputError for others.
    """

    def __init__(self, model: Sam, prompt: str | None = None):
        if not isinstance(model, Sam) or getattr(model, "spec", None) is None:
            raise InputError(f"{kind_of(model)} is no SAM of samlora; build one with samlora.build_model or load_model")
        self.row, self.spec = system_row(model.spec.system), model.spec
        self.side, self.low, self.fill = model.image_size, model.logit_side, model.fill
        if prompt is not None and prompt not in PROMPTS:
            raise InputError(f"prompt {prompt!r} is not possible; allowed: {', '.join(PROMPTS)}")
        self.prompting = Prompting(prompt) if prompt is not None else self.row.prompting

    def __call__(
        self, image: np.ndarray, mask: np.ndarray | None = None, generator: np.random.Generator | None = None
    ) -> dict[str, Tensor | tuple[int, int]]:
        """One sample as tensors.

        image: (H, W) or (H, W, 3), uint8 or float in 0..1. mask: (H, W), the object where it is not 0; None for none:
        then only a prompt that needs no object is possible. generator: of what is random; a fresh one with seed 0 by
        default. Returns image (3, S, S) float32 in 0..1, original_size (H, W), and where they apply boxes (1, 4),
        point_coords (1, N, 2) and point_labels (1, N) in pixels of the model's square, ground_truth_mask (L, L) float32
        and inside (L, L) bool, false in the padding. Raises InputError for an empty mask where the prompt needs one.
        """
        image = check_picture(image, "the image", self.spec.in_channels)
        height, width = image.shape[:2]
        mask = None if mask is None else check_mask(mask, "the mask", (height, width))
        return self.sample(image, mask, generator)

    def sample(
        self, image: np.ndarray, mask: np.ndarray | None, generator: np.random.Generator | None
    ) -> dict[str, Tensor | tuple[int, int]]:
        """The same of what is known to be sound, such as prepared slices, whose values may leave 0..1 a little."""
        height, width = image.shape[:2]
        frame = Frame(height, width, self.side, self.spec.pixels, low=self.low)
        sample: dict = {
            "image": torch.from_numpy(frame.image(image, self.fill)),
            "original_size": (height, width),
        }
        if mask is not None:
            sample["ground_truth_mask"] = torch.from_numpy(frame.label(mask != 0).astype(np.float32))
            sample["inside"] = torch.from_numpy(np.array(frame.inside))
        shown = np.zeros((height, width), bool) if mask is None else mask != 0
        drawn = draw_prompt(shown, self.prompting, frame, generator or np.random.default_rng(0))
        if drawn.box is not None:
            sample["boxes"] = torch.from_numpy(drawn.box)[None]
        if len(drawn.points):
            sample["point_coords"] = torch.from_numpy(drawn.points)[None]
            sample["point_labels"] = torch.from_numpy(drawn.labels)[None]
        return sample


class DatasetSegmentation(torch.utils.data.Dataset):
    """The samples of a folder, one for each class that a slice shows, made by a `Samprocessor`.

    source: MedSAM's .npz (`imgs`, `gts`) or slices of `samlora prepare`, or a folder of pictures and masks that
    `samlora prepare` reads, 2D; of one with train/ and test/ give train/. recipe: how such pictures and masks are read,
    a Recipe, a name or a YAML file: as `samlora prepare` does, but at their own size (`keep` and `test_cases` do not
    matter here). Without one they are read as `samlora plan` would write it, so JPEG masks, and masks of 254 and 255,
    are one class. `recipe` is then the one that is used, classes included; None for what is prepared already.
    Samples are those of the processor, with `name` and `label`, the class, added; what is random about one depends on
    the seed and its number alone. Raises MissingFileError or InputError for a folder that holds neither, label values
    that may be classes or levels of gray where no recipe says which, and a recipe for what is prepared already.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        processor: Samprocessor,
        seed: int = 0,
        recipe: Recipe | str | os.PathLike | None = None,
    ):
        if not isinstance(processor, Samprocessor):
            raise InputError(f"processor: is of type {kind_of(processor)}; a samlora.Samprocessor is needed")
        self.processor, self.seed = processor, seed
        self.recipe, self._pictures = _pictures(find_file(source), recipe)
        self._objects = [
            (number, int(label))
            for number, (_, read) in enumerate(self._pictures)
            for label in np.unique(read()[1])
            if label
        ]
        if not self._objects:
            raise InputError(f"{source}: every mask is empty; nothing can be asked for")

    def __len__(self) -> int:
        return len(self._objects)

    def __getitem__(self, index: int) -> dict:
        number, label = self._objects[index]
        name, read = self._pictures[number]
        image, labels = read()
        sample = self.processor.sample(image, labels == label, np.random.default_rng([self.seed, 6, index]))
        return sample | {"name": name, "label": label}


def _pictures(source: Path, recipe: Recipe | str | os.PathLike | None) -> tuple[Recipe | None, list[tuple]]:
    """The recipe that is used; name of every picture, and what reads its image (H, W[, 3]) in 0..1 and its classes."""
    if not source.is_dir():
        what = "is a file; give the folder that it lies in" if source.is_file() else "there is no such folder"
        raise MissingFileError(f"{source}: {what}")
    if list(source.glob("*.npz")) or (source / "train_npz").is_dir():
        if recipe is not None:
            raise InputError(f"{source}: its slices are prepared, no recipe applies to them; leave recipe out")
        made = read_recipe(source)
        made_by = None if made is None else made.to_dict()

        def slice_reader(item):
            def read() -> tuple[np.ndarray, np.ndarray]:
                image, label = item.read()
                return image, split_ignored(label, made_by)[0]

            return read

        return None, [(item.name, slice_reader(item)) for item in find_slices(source)]
    used, layout = _recipe_for(source, recipe)

    def reader(pair):
        def read() -> tuple[np.ndarray, np.ndarray]:
            image = read_image(pair)
            case = used.to_case(image, read_label(pair, image, used)[0])
            if len(case.image) > 1:
                raise InputError(f"{pair.images[0]}: is a volume; prepare volumes with samlora prepare --medsam")
            return case.image[0], drop_small_parts(case.label, used.min_voxels, used.min_pixels)[0]

        return read

    return used, [(pair.name, reader(pair)) for pair in layout.pairs]


def _recipe_for(source: Path, recipe: Recipe | str | os.PathLike | None) -> tuple[Recipe, Layout]:
    """The recipe with its classes, by `samlora plan` if none is given, and the cases that it takes."""
    if recipe is None:
        made = plan(source)
        used, layout = made.recipe, made.layout
        guessed = "mask_threshold" not in made.choices
    else:
        given = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        layout = find_pairs(source)
        layout = dataclasses.replace(layout, pairs=wanted(layout.pairs, given))
        used = resolve_classes(given, layout)
        guessed = not given.classes
    values = [value for group in used.label_values for value in group]
    numbers = all(isinstance(value, int) for value in values)
    if guessed and not layout.classes and len(values) > 1 and numbers and max(values) > SOFT:
        shown = " ".join(map(str, values[:8])) + (" ..." if len(values) > 8 else "")
        raise InputError(
            f"{source}: label values {shown} may be classes, or one object in levels of gray; give recipe=, with "
            f"classes or with mask_threshold: {SOFT}"
        )
    return used, layout
