"""What the measures are called and how they are shown: in the printed table and on the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """A measure as people see it: key in the results, title, unit, factor to that unit, digits.

    better: "high", "low", or "zero" for errors with a sign.
    """

    key: str
    title: str
    unit: str
    scale: float = 1.0
    digits: int = 2
    better: str = "low"

    @property
    def head(self) -> str:
        """Title and unit, for the head of a column."""
        return f"{self.title} [{self.unit}]"

    @property
    def brief(self) -> str:
        """The same where there is little room."""
        return self.head.replace("Surface Dice", "NSD").replace("Volume error", "volume")

    def text(self, value: float | None, signed: bool = False) -> str:
        """The value as text; "-" where it is undefined."""
        if value is None or math.isnan(value):
            return "-"
        sign = "+" if signed and self.better == "zero" else ""
        return f"{value * self.scale:{sign}.{self.digits}f}"


_FRACTIONS = {
    "dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall", "specificity": "Specificity",
    "accuracy": "Accuracy",
}  # fmt: skip
_DISTANCES = {"hd95": "HD95", "assd": "ASSD", "hd": "HD", "asd": "ASD"}
_VOLUMES = {
    "volume_error_percent": ("Volume error", "%", 1, "zero"),
    "volume_error_ml": ("Volume error", "ml", 2, "zero"),
    "volume_ml": ("Volume", "ml", 2, "high"),
    "reference_ml": ("Reference volume", "ml", 2, "high"),
}
FIRST = ("dice", "hd95", "assd", "nsd", "volume_error_percent")  # what a summary shows before all the rest


def shown_measures(policy: str, unit: str, tolerances: Sequence[float]) -> dict[str, Shown]:
    """key -> how it is shown, the most asked for first. unit: "mm" or "px"; tolerances: of nsd, then the others."""
    if policy == "samed":
        return {
            "dice": Shown("dice", "Dice", "%", 100, 2, "high"),
            "hd95": Shown("hd95", "HD95", "px" if unit == "px" else "voxels"),
        }
    first, *more = tolerances
    surface = {"nsd": first} | {f"nsd_{t:g}{unit}": t for t in more}
    titles = {key: f"Surface Dice {t:g} {unit}" for key, t in surface.items()}
    every = [Shown(k, title, "%", 100, 2 if k == "dice" else 1, "high") for k, title in (_FRACTIONS | titles).items()]
    every += [Shown(key, title, unit) for key, title in _DISTANCES.items()]
    volumes = {k: v for k, v in _VOLUMES.items() if unit == "mm" or not k.endswith("ml")}
    every += [Shown(key, title, of, 1, digits, better) for key, (title, of, digits, better) in volumes.items()]
    found = {shown.key: shown for shown in every}
    order = dict.fromkeys(("dice", "hd95", "assd", *sorted(surface, key=surface.get), *FIRST, *found))
    return {key: found[key] for key in order}


def state(values: Mapping[str, float]) -> str:
    """What a strict result says of a class in a case: "absent", "missed", "added", or "" where both maps have it."""
    if math.isnan(values.get("dice", math.nan)):
        return "absent"
    if values.get("volume_error_percent") == -100:
        return "missed"
    return "added" if math.isnan(values.get("volume_error_percent", 0.0)) else ""
