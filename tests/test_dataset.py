"""Slices on disk: found, checked, split by case, drawn in a reproducible order."""

from pathlib import Path

import numpy as np
import pytest

from samlora.data.dataset import (
    Batches,
    SliceDataset,
    SliceFile,
    check_slices,
    find_slices,
    find_volumes,
    fingerprint,
    split_cases,
)
from samlora.data.grid import Case
from samlora.data.volume import write_case, write_slice
from samlora.errors import InputError, MissingFileError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for case in range(4):
        for n in range(3):
            label = np.zeros((8, 8), np.uint8)
            label[case : case + 2] = 2
            write_slice(
                tmp_path / "train_npz" / f"case{case:04d}_slice{n:03d}.npz", rng.random((8, 8)), label
            )
    write_case(Case(rng.random((2, 8, 8))), tmp_path / "test_vol_h5" / "case0009.npy.h5")
    return tmp_path


def test_found_with_and_without_lists(folder):
    slices = find_slices(folder)
    assert len(slices) == 12 and slices == find_slices(folder / "train_npz")
    assert slices[3].name == "case0001_slice000" and slices[3].case == "case0001"
    (folder / "lists").mkdir()
    (folder / "lists" / "train.txt").write_text("case0002_slice001\n\n")
    (folder / "lists" / "test_vol.txt").write_text("case0009\n")
    assert [s.name for s in find_slices(folder, folder / "lists")] == ["case0002_slice001"]
    assert (
        find_volumes(folder)
        == find_volumes(folder, folder / "lists")
        == [folder / "test_vol_h5" / "case0009.npy.h5"]
    )


def test_contents_are_counted(folder):
    contents = check_slices(find_slices(folder), 3)
    assert contents.pixels.tolist() == [12 * 48, 0, 12 * 16, 0]
    assert 0 <= contents.low < 0.1 and 0.9 < contents.high <= 1


def test_cases_stay_whole(folder):
    slices = find_slices(folder)
    train, val = split_cases(slices, val_cases=["case0003"])
    assert {s.case for s in val} == {"case0003"} and len(train) == 9
    train, val = split_cases(slices, val_fraction=0.5, seed=1)
    assert len({s.case for s in val}) == 2 and not {s.case for s in train} & {s.case for s in val}
    assert split_cases(slices, val_fraction=0.5, seed=1) == (train, val)
    assert len({s.case for s in split_cases(slices, val_fraction=0.01)[1]}) == 1
    assert split_cases(slices) == (slices, [])


def test_fingerprint_sees_contents_and_names(folder):
    slices = find_slices(folder)
    before = fingerprint(slices)
    assert before == fingerprint(find_slices(folder)) != fingerprint(slices[1:])
    write_slice(slices[0].path, np.zeros((8, 8)), np.zeros((8, 8), np.uint8))
    assert fingerprint(slices) != before


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_what_is_no_archive_has_no_fingerprint_but_where_it_is_skipped(folder, spoil):
    slices = find_slices(folder)
    before = fingerprint(slices, skip=True)
    spoil(slices[1].path)
    with pytest.raises(InputError, match=slices[1].path.name) as error:
        fingerprint(slices)
    assert "\n" not in str(error.value)
    assert len({before, fingerprint(slices, skip=True), fingerprint(slices[:1] + slices[2:])}) == 3


def test_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    slices = find_slices(folder)
    a, b = (SliceDataset(slices, seed=3) for _ in range(2))
    assert [a[e, i].transform for e in range(5) for i in range(12)] == [
        b[e, i].transform for e in range(5) for i in range(12)
    ]
    assert len({a[e, 0].transform for e in range(40)}) > 10
    assert [SliceDataset(slices, seed=4)[e, 0].transform for e in range(9)] != [
        a[e, 0].transform for e in range(9)
    ]


@pytest.mark.parametrize("count, size, ranks", [(10, 3, 1), (10, 3, 2), (12, 4, 1), (5, 8, 1), (9, 2, 4)])
def test_every_epoch_draws_every_sample_once(count, size, ranks):
    per_rank = [list(Batches(count, size, 3, seed=0, rank=r, ranks=ranks)) for r in range(ranks)]
    steps = [sum(parts, []) for parts in zip(*per_rank)]
    assert len(steps) == len(Batches(count, size, 3, 0, ranks=ranks)) == 3 * -(-count // (size * ranks))
    for epoch in range(3):
        drawn = [i for step in steps for e, i in step if e == epoch]
        assert set(drawn) == set(range(count))
        assert len(drawn) - count in range(ranks)  # only a last batch smaller than the ranks repeats samples
    assert all(batch for rank in per_rank for batch in rank)


def test_drawing_can_start_anywhere():
    everything = list(Batches(10, 3, 4, seed=7))
    for start in range(len(everything)):
        rest = Batches(10, 3, 4, seed=7, start=start)
        assert list(rest) == everything[start:] and len(rest) == len(everything) - start
    assert [i for _, i in everything[0]] != [i for _, i in everything[4]]


def write_bad(path, **arrays):
    np.savez(path, **arrays)


ERRORS = {
    "outside": (lambda f: write_bad(f / "train_npz" / "case0000_slice000.npz", image=np.zeros((8, 8)), label=np.full((8, 8), 7)), ("case0000_slice000.npz", "7", "0..3", "--num_classes")),
    "negative": (lambda f: write_bad(f / "train_npz" / "case0000_slice000.npz", image=np.zeros((8, 8)), label=np.full((8, 8), -1)), ("case0000_slice000.npz", "-1")),
    "no label": (lambda f: write_bad(f / "train_npz" / "case0001_slice000.npz", image=np.zeros((8, 8))), ("case0001_slice000.npz", "'label'")),
    "object": (lambda f: write_bad(f / "train_npz" / "case0001_slice000.npz", image=np.array([{}]), label=np.zeros((8, 8))), ("case0001_slice000.npz",)),
    "cut": (lambda f: (f / "train_npz" / "case0002_slice000.npz").write_bytes(b"PK\x03\x04abc"), ("case0002_slice000.npz", "cannot be read")),
    "nan": (lambda f: write_bad(f / "train_npz" / "case0002_slice000.npz", image=np.full((8, 8), np.nan), label=np.zeros((8, 8), int)), ("case0002_slice000.npz", "NaN")),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_files_are_named_before_training(folder, name):
    spoil, words = ERRORS[name]
    spoil(folder)
    with pytest.raises(InputError) as error:
        check_slices(find_slices(folder), 3)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: find_slices(f / "nowhere"), "nowhere"),
        (lambda f: find_slices(f / "empty"), "no training slices"),
        (lambda f: find_volumes(f / "empty"), "no test volumes"),
        (lambda f: find_slices(f, f / "empty"), "train.txt"),
        (lambda f: find_slices(f, f / "wrong"), "case0077_slice000.npz"),
        (lambda f: split_cases(find_slices(f), ["case0042"]), "case0042"),
        (lambda f: split_cases(find_slices(f), [], 1.5), "1.5"),
        (lambda f: split_cases(find_slices(f), [f"case000{i}" for i in range(4)]), "none to train on"),
    ],
)
def test_errors(folder, call, words):
    (folder / "empty").mkdir()
    (folder / "wrong").mkdir()
    (folder / "wrong" / "train.txt").write_text("case0077_slice000\n")
    with pytest.raises((InputError, MissingFileError)) as error:
        call(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def by_patient(case):
    return case.split("_")[0]


def frames(*cases):
    return [SliceFile(Path(f"{case}_slice{n:03d}.npz"), case) for case in cases for n in range(2)]


def test_patients_are_split_whole():
    slices = frames("p1_a", "p1_b", "p2_a", "p2_b", "p3_a", "p4_a")
    for seed in range(6):
        train, val = split_cases(slices, val_fraction=0.5, seed=seed, patient_of=by_patient)
        sides = [{by_patient(s.case) for s in part} for part in (train, val)]
        assert not sides[0] & sides[1] and len(sides[1]) == 2 and len(train) + len(val) == len(slices)


def test_a_patient_on_both_sides_is_refused():
    with pytest.raises(InputError, match="--val_cases p1_a: p1_b shows the same patient"):
        split_cases(frames("p1_a", "p1_b", "p2_a"), val_cases=["p1_a"], patient_of=by_patient)
    train, val = split_cases(frames("p1_a", "p1_b", "p2_a"), val_cases=["p1_a", "p1_b"], patient_of=by_patient)
    assert {s.case for s in val} == {"p1_a", "p1_b"} and {s.case for s in train} == {"p2_a"}
