"""The synthetic abdomen: all organs, plausible gray values, the right side, exact files."""

import nibabel
import numpy as np
import pytest

from samlora.data.phantom import BTCV_IDS, ORGANS, abdomen, write_cases

SHAPE, SPACING = (64, 64, 25), (5.6, 5.6, 8.0)  # a quarter of the voxels, for speed
PLAUSIBLE = {  # HU of the mean over an organ, across contrast phases
    "spleen": (35, 130), "right kidney": (20, 195), "left kidney": (20, 195), "gallbladder": (-25, 35),
    "liver": (40, 120), "stomach": (-700, 270), "aorta": (25, 260), "pancreas": (15, 110),
}


@pytest.fixture(scope="module")
def cases():
    return [abdomen(seed, SHAPE, SPACING) for seed in range(4)]


def test_all_organs_in_every_case(cases):
    for hu, labels, _ in cases:
        assert hu.dtype == np.int16 and labels.dtype == np.uint8 and hu.shape == labels.shape == SHAPE
        assert set(np.unique(labels)) == set(range(len(ORGANS) + 1))


def test_gray_values_are_plausible(cases):
    for hu, labels, _ in cases:
        for number, organ in enumerate(ORGANS, start=1):
            low, high = PLAUSIBLE[organ]
            assert low < hu[labels == number].mean() < high, organ
        assert (hu < -900).mean() > 0.2  # air around the body
        assert (hu > 300).any()  # bone


def test_a_seed_is_a_patient(cases):
    again = abdomen(0, SHAPE, SPACING)
    for first, second in zip(cases[0], again, strict=True):
        np.testing.assert_array_equal(first, second)
    for (hu, labels, _), (other_hu, other_labels, _) in zip(cases, cases[1:], strict=False):
        assert (hu != other_hu).mean() > 0.5
        assert (labels != other_labels).any()


def test_organs_lie_on_their_side(cases):
    for _, labels, affine in cases:
        assert nibabel.aff2axcodes(affine) == ("R", "A", "S")
        np.testing.assert_allclose(nibabel.affines.voxel_sizes(affine), SPACING)
        places = [nibabel.affines.apply_affine(affine, np.argwhere(labels == n)).mean(0) for n in range(1, 9)]
        right = {organ: place[0] for organ, place in zip(ORGANS, places, strict=True)}
        assert min(right["liver"], right["right kidney"], right["gallbladder"]) > 0
        assert max(right["spleen"], right["left kidney"], right["stomach"]) < 0
        assert places[ORGANS.index("aorta")][1] < places[ORGANS.index("stomach")][1]  # stomach in front


def test_written_cases_read_back(tmp_path):
    images = write_cases(tmp_path, 2, seed=3, shape=SHAPE, spacing=SPACING)
    assert [path.name for path in images] == ["img0001.nii.gz", "img0002.nii.gz"]
    assert sorted(p.name for p in (tmp_path / "label").iterdir()) == ["label0001.nii.gz", "label0002.nii.gz"]
    hu, labels, affine = abdomen(30_001, SHAPE, SPACING)
    image, label = nibabel.load(images[0]), nibabel.load(tmp_path / "label" / "label0001.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), hu)
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    written = np.asarray(label.dataobj)
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, np.array((0, *BTCV_IDS))[labels])
    np.testing.assert_allclose(label.affine, image.affine)
