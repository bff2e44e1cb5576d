"""The recipe of a volume of which nothing is known but itself."""

import dataclasses

import numpy as np

from samlora.data.grid import Volume, reorient
from samlora.data.plan_looks import AIR
from samlora.data.recipe import Recipe

_AIR_SHARE = 0.01  # of the voxels of a CT are air, at least
_THICK = 1.5  # times the spacing within slices: then the volume was taken in slices, and these are shown


def usual_recipe(volume: Volume) -> Recipe:
    """A recipe for a volume of which nothing else is known: what a person would want to see.

    Pictures, 8 bits, values in 0..1: as they are. CT, by its air: `generic_ct`'s soft tissue window and crop. All else:
    the percentiles 0.5 and 99.5 of its voxels. Volumes in space are turned to LPS and cut across their thickest
    spacing, axially if there is none.
    """
    array = volume.array
    low, high = float(array.min()), float(array.max())
    full = array.dtype == np.uint16 and high > np.iinfo(np.uint16).max / 2
    if (
        array.dtype == np.uint8
        or (full and not volume.has_spacing)
        or (array.dtype.kind == "f" and 0 <= low and high <= 1)
    ):
        recipe = Recipe("usual_picture", "image", channels="rgb" if array.ndim == 4 else "repeat")
    elif low <= AIR and (array <= AIR).mean() >= _AIR_SHARE:
        recipe = Recipe.load("generic_ct")
    else:
        recipe = Recipe("usual_volume", "mr", percentiles=(0.5, 99.5))
    if not volume.has_spacing:
        return recipe
    turned = reorient(volume, "LPS")
    spacing = np.array(turned.spacing)
    thick = int(spacing.argmax())
    alone = [axis for axis, size in enumerate(turned.array.shape[:3]) if size == 1]
    others = np.delete(spacing, thick).max()
    axis = alone[0] if alone else thick if spacing[thick] >= _THICK * others else 2
    return dataclasses.replace(recipe, orientation="LPS", slice_axis=axis)
