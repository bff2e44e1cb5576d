"""Voxels of prepared labels that nobody has labelled: they are in no loss and in no measure."""

from collections.abc import Mapping

import numpy as np

IGNORE = 255  # in training slices and test volumes of recipes that ignore values


def ignores(recipe: Mapping | None) -> bool:
    """Whether labels that were made by a recipe, as plain values, may hold IGNORE."""
    return bool((recipe or {}).get("ignore"))


def split_ignored(
    label: np.ndarray, recipe: Mapping | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """A label without IGNORE, and where it was.

    Args:
        label: as it is stored.
        recipe: what made it, as plain values.

    Returns:
        The label with background in place of IGNORE, and a bool array of its shape; `label`
        itself and None where the recipe ignores nothing, as 255 may be a class then.
    """
    if not ignores(recipe):
        return label, None
    ignored = label == IGNORE
    return with_ignored(label, ignored, 0), ignored


def with_ignored(label: np.ndarray, ignored: np.ndarray | None, value: int = IGNORE) -> np.ndarray:
    """A label, or a prediction, with `value` where `ignored` is true; itself where that is None.

    With IGNORE it is the label as it is stored: the way back from `split_ignored`.
    """
    return label if ignored is None else np.where(ignored, label.dtype.type(value), label)
