"""Which cases train and which are held out: folds by patient, and nested subsets of the training cases."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from samlora.errors import InputError


@dataclass(frozen=True)
class Fold:
    """A split of the cases. train: in an order by which the first n are the subset of n; held: sorted."""

    number: int
    train: tuple[str, ...]
    held: tuple[str, ...]

    def shots(self, count: int | None) -> tuple[str, ...]:
        """The training cases of a few-shot run, sorted: those of any smaller count are among them."""
        return tuple(sorted(self.train[:count]))


def make_folds(patients: Mapping[str, str], count: int, seed: int) -> list[Fold]:
    """Deals the patients (case -> patient) into `count` folds; each holds one part out and trains on the others.

    The order depends on the seed and the names alone. Subsets take one case of every patient, in a random order of
    patients, before they take a second of any: few cases of many patients teach more than many of one.
    Raises InputError for fewer patients than folds.
    """
    names = sorted(set(patients.values()))
    if count > len(names):
        raise InputError(
            f"--folds {count}: the data has {len(names)} patients, each of whom is held out once; give a number from 2 "
            f"to {len(names)}"
            if len(names) > 1
            else f"--folds {count}: the data has one patient; two at least are needed"
        )
    dealt = np.random.default_rng([seed, 6]).permutation(names)
    folds = []
    for number in range(count):
        out = set(dealt[number::count].tolist())
        held = tuple(sorted(case for case, patient in patients.items() if patient in out))
        order = np.random.default_rng([seed, 7, number]).permutation([name for name in names if name not in out])
        place = {patient: n for n, patient in enumerate(order.tolist())}
        seen: dict[str, int] = {}
        turns = {}
        for case in sorted(case for case, patient in patients.items() if patient not in out):
            turns[case] = seen[patients[case]] = seen.get(patients[case], -1) + 1
        train = sorted(turns, key=lambda case: (turns[case], place[patients[case]]))
        folds.append(Fold(number, tuple(train), held))
    return folds
