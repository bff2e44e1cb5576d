"""The options of samlora compare."""

from dataclasses import dataclass
from typing import Any

from samlora.errors import InputError
from samlora.options import option
from samlora.prompting import Prompting

COMMON_PROMPTS = {"box": Prompting("box"), "point": Prompting("pt")}


@dataclass(frozen=True)
class CompareConfig:
    """All of a comparison but the systems."""

    data: str | None = option(None, "folder of prepared data: its training slices are split into folds by patient")
    output: str | None = option(None, "folder for the runs, the tables and report.html")
    folds: int = option(5, "parts the patients are dealt into; each is held out once")
    seeds: int = option(1, "trainings of every system on every fold, with seeds seed, seed + 1, ...")
    seed: int = option(1234, "seed of the folds, of the few-shot subsets and of the first training")
    set: dict[str, Any] = option(
        {}, "options of training for all systems that take them; a,b makes variants of an option that takes one value"
    )
    prompts: str = option(
        "own",
        "what systems with prompts are measured with: own is what each trains with; box (of each class and slice) or "
        "point (one on it, random) is the same for all, so that all stand in one table",
        ("own", *COMMON_PROMPTS),
    )
    max_seconds: float = option(0.0, "training time of every run, whatever its epochs say; 0: as long as it plans")
    shots: tuple[str, ...] = option(
        (), "few-shot runs: numbers of training cases, such as 1,5,10,all; the smaller sets are within the larger"
    )
    jobs: int | None = option(
        None, "runs at the same time (default: 1, or one per --devices); 0: one after the other in this process"
    )
    devices: tuple[str, ...] = option((), "GPUs to deal the runs to, such as cuda:0 cuda:1 (default: what each finds)")
    pictures: int = option(6, "held-out cases of which a slice is shown, by all systems; 0: none")
    overwrite: bool = option(False, "train again the runs in --output that were made from other data or options")

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("seeds", 1), ("jobs", 0), ("max_seconds", 0), ("pictures", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise InputError(f"--{name} {value} is not possible; give {least} or more")
        if self.data is None:
            raise InputError("--data is missing; give the folder of prepared data (samlora prepare makes one)")
        if self.output is None:
            raise InputError("--output is missing; give a folder for the results, with -o")
        if self.devices and self.jobs == 0:
            raise InputError("--jobs 0 trains in this process, which sees all devices; leave --devices out")
        for device in self.devices:
            if not device.removeprefix("cuda:").isdigit():
                raise InputError(f"--devices {device}: give GPUs as cuda:0 cuda:1; a CPU needs --set device=cpu")
        for shots in self.wanted_shots:
            if shots is not None and shots < 1:
                raise InputError(f"--shots {shots} is not possible; give numbers of cases, 1 or more, or all")

    @property
    def wanted_shots(self) -> list[int | None]:
        """Numbers of training cases, in order and once each; None is all of them."""
        words = [word for text in self.shots for word in text.split(",") if word]
        for word in words:
            if word != "all" and not word.lstrip("-").isdigit():
                raise InputError(f"--shots {word}: give numbers of cases, such as 1,5,10, or all")
        numbers = {None if word == "all" else int(word) for word in words} or {None}
        return sorted(numbers, key=lambda n: float("inf") if n is None else n)

    @property
    def gpus(self) -> list[int]:
        """The GPUs of --devices as numbers."""
        return [int(device.removeprefix("cuda:")) for device in self.devices]
