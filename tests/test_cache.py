"""Decoded slices: the same values, made once, never out of date."""

import pickle

import numpy as np
import pytest

from samlora.data.cache import SliceCache
from samlora.data.dataset import SliceDataset, find_slices
from samlora.data.volume import write_slice


@pytest.fixture
def slices(tmp_path):
    rng = np.random.default_rng(0)
    for n, shape in enumerate([(8, 9), (12, 5), (8, 9, 3)]):
        image, label = rng.standard_normal(shape).astype(np.float32), rng.integers(0, 4, shape[:2]).astype(np.uint8)
        write_slice(tmp_path / f"train_npz/case{n}_slice000.npz", image, label)
    return find_slices(tmp_path)


def test_samples_are_those_of_the_files(slices, tmp_path):
    decoded = SliceCache(tmp_path / "cache", slices)
    plain, cached = SliceDataset(slices, seed=3), SliceDataset(slices, seed=3, decoded=decoded)
    for key in [(epoch, index) for epoch in (0, 1) for index in range(3)]:
        one, other = plain[key], cached[key]
        assert np.array_equal(one.image, other.image) and np.array_equal(one.label, other.label)
        assert (one.name, one.transform) == (other.name, other.transform)
        other.image[:] = 0  # what was handed out may be changed
        assert np.array_equal(cached[key].image, one.image)


def test_it_is_made_once_and_survives_a_journey_to_another_process(slices, tmp_path):
    first = SliceCache(tmp_path / "cache", slices)
    first[0]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = pickle.loads(pickle.dumps(SliceCache(tmp_path / "cache", slices)))
    assert made == {path: path.stat().st_mtime_ns for path in made} and len(made) == 3
    assert all(np.array_equal(a, b) for n in range(3) for a, b in zip(first[n], again[n]))
    assert len(pickle.dumps(first)) < 2000  # no voxels travel


def test_other_data_and_damage_are_noticed(slices, tmp_path):
    SliceCache(tmp_path / "cache", slices)
    image, label = np.ones((4, 4), np.float32), np.ones((4, 4), np.uint8)
    write_slice(slices[0].path, image, label)
    assert np.array_equal(SliceCache(tmp_path / "cache", slices)[0][0], image)
    for path in (tmp_path / "cache").glob("*.labels"):
        path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(SliceCache(tmp_path / "cache", slices)[0][1], label)
