"""Volumes keep their place in space, whatever is done to them; broken files give one line that names them."""

import dataclasses
import gc
import gzip
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK

from samlora.data.grid import Case, Geometry, Volume, case_to_volume, match_grid, reorient
from samlora.data.recipe import Recipe
from samlora.data.volume import (
    VOLUMES,
    read_case,
    read_slice,
    read_volume,
    stem,
    write_case,
    write_medsam,
    write_slice,
    write_volume,
)
from samlora.errors import InputError, MissingFileError

ORIENTATIONS = ["".join(o) for p in itertools.permutations(["LR", "PA", "IS"]) for o in itertools.product(*p)]


def oblique(shape=(5, 6, 7), dtype=np.int16) -> Volume:
    """Voxels that all differ, on a grid rotated about all three axes."""
    a, b, c = 0.3, -0.2, 0.4
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rx @ ry @ rz * [0.7, 0.8, 2.5]
    affine[:3, 3] = -31.5, 12.25, 400
    # As a file would hold it, so that comparisons can be exact.
    affine = affine.astype(np.float32).astype(np.float64)
    return Volume(np.arange(np.prod(shape)).reshape(shape).astype(dtype), affine, 1, 1, path="oblique")


def places(volume: Volume) -> dict:
    """value -> where it lies (mm)."""
    index = np.argwhere(np.ones(volume.array.shape, bool))
    mm = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return dict(zip(volume.array[tuple(index.T)].tolist(), mm))


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_turning_moves_no_voxel_and_is_undone_exactly(axes):
    volume = oblique()
    turned = reorient(volume, axes)
    assert turned.axes == axes
    where, there = places(volume), places(turned)
    assert all(np.allclose(where[value], there[value], atol=1e-9) for value in where)
    back = reorient(turned, volume.axes)
    assert np.array_equal(back.array, volume.array) and np.allclose(back.affine, volume.affine, atol=1e-12)
    matched = match_grid(turned, to=volume)
    assert np.array_equal(matched.array, volume.array) and matched.affine is volume.affine


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_slices_find_the_way_back_to_their_source(stored, slice_axis):
    source = reorient(oblique(dtype=np.uint8), stored)
    for orientation in (None, "LPS", "PIR"):
        recipe = Recipe("r", "image", orientation=orientation, slice_axis=slice_axis)
        slices = recipe.to_slices(source)
        geometry = source.geometry(orientation, slice_axis)
        back = case_to_volume(Case(slices, None, geometry), slices)
        assert np.array_equal(back.array, source.array) and back.affine is source.affine
        spacing = Case(slices, None, geometry).spacing
        assert np.prod(spacing) == pytest.approx(0.7 * 0.8 * 2.5, rel=1e-6)


def test_the_slice_axis_has_the_right_spacing():
    volume = reorient(oblique(), "RAS")
    case = Case(np.zeros((7, 6, 5), np.float32), geometry=volume.geometry(None, 2))
    assert case.spacing == pytest.approx((2.5, 0.8, 0.7), rel=1e-6)


@pytest.mark.parametrize("codes", [(0, 2), (1, 0), (1, 1), (2, 4), (0, 0)])
def test_nifti_keeps_affine_codes_and_type(codes, tmp_path):
    volume = oblique(dtype=np.uint8)
    volume.qform_code, volume.sform_code = codes
    if codes == (0, 0):  # then the affine is what readers make up from the voxel sizes
        volume.affine = nibabel.Nifti1Image(volume.array, None).header.get_best_affine()
    path = tmp_path / "label.nii.gz"
    write_volume(volume, path)
    header = nibabel.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == codes
    assert header.get_data_dtype() == np.uint8 and header.get_xyzt_units()[0] == "mm"
    read = read_volume(path)
    assert np.array_equal(read.array, volume.array) and read.array.dtype == np.uint8
    np.testing.assert_allclose(read.affine, volume.affine, atol=0 if codes[1] else 1e-4)
    assert (read.qform_code, read.sform_code) == codes


def test_a_second_affine_is_kept(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([2, 2, 2, 1]))
    image.header.set_qform(np.diag([-2, -2, 2, 1]), 1)
    image.header.set_sform(np.diag([2, 2, 2, 1]), 4)
    nibabel.save(image, tmp_path / "a.nii")
    write_volume(read_volume(tmp_path / "a.nii"), tmp_path / "b.nii")
    header = nibabel.load(tmp_path / "b.nii").header
    assert np.allclose(header.get_qform(), np.diag([-2, -2, 2, 1])) and int(header["sform_code"]) == 4


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_itk_formats_place_voxels_where_nifti_does(ending, tmp_path):
    volume = oblique()
    write_volume(volume, tmp_path / f"a{ending}")
    read = read_volume(tmp_path / f"a{ending}")
    assert np.array_equal(read.array, volume.array) and np.allclose(read.affine, volume.affine, atol=1e-5)
    # ITK's own NIfTI writer as the second opinion on where that is.
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / f"a{ending}")), str(tmp_path / "b.nii.gz"))
    assert np.allclose(nibabel.load(tmp_path / "b.nii.gz").affine, volume.affine, atol=1e-4)


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_every_orientation_comes_back_from_every_format(axes, tmp_path):
    volume = reorient(oblique(), axes)
    for name in ("a.nii", "a.nrrd", "a.mha"):
        write_volume(volume, tmp_path / name)
        read = read_volume(tmp_path / name)
        assert np.array_equal(read.array, volume.array) and read.axes == axes
        np.testing.assert_allclose(read.affine, volume.affine, atol=1e-4)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha", "a.npy"])
@pytest.mark.parametrize(
    "shape", [(5, 6, 7, 2), (7, 8, 1, 3), (5, 6, 1, 2), (6, 5, 4), (5, 6, 1), (4, 6, 7), (4, 6, 7, 4)]
)
def test_channels_and_shapes_come_back_as_written(name, shape, tmp_path):
    array = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    write_volume(Volume(array, oblique().affine, 1, 1), tmp_path / name)
    read = read_volume(tmp_path / name)
    assert np.array_equal(read.array, array) and read.array.dtype == np.uint8
    assert read.has_spacing == (name != "a.npy")
    if name != "a.npy":
        np.testing.assert_allclose(read.affine, oblique().affine, atol=1e-4)


def test_flat_files_and_vectors_are_volumes(tmp_path):
    array = np.arange(30, dtype=np.int16).reshape(5, 6)
    for name in ("a.nii", "a.nrrd", "a.mha"):
        image = SimpleITK.GetImageFromArray(array.T)
        image.SetSpacing((0.5, 2.0))
        SimpleITK.WriteImage(image, str(tmp_path / name))
        read = read_volume(tmp_path / name)
        assert np.array_equal(read.array, array[:, :, None]) and read.spacing[:2] == (0.5, 2.0) and read.axes == "LPS"
    vectors = np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1)
    nibabel.save(nibabel.Nifti1Image(np.stack([vectors, -vectors], axis=-1), np.eye(4)), tmp_path / "v.nii")
    assert np.array_equal(read_volume(tmp_path / "v.nii").array, np.concatenate([vectors, -vectors], axis=-1))
    colours = np.zeros((2, 3, 4), [(c, np.uint8) for c in "RGB"])
    colours["G"] = 7
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "c.nii")
    assert read_volume(tmp_path / "c.nii").array.shape == (2, 3, 4, 3)
    one = Volume(np.full((3, 3, 3), 7, np.int16), np.eye(4))
    write_volume(one, tmp_path / "one.nii")
    assert np.array_equal(read_volume(tmp_path / "one.nii", labels=True, threshold=6.5).array, np.ones((3, 3, 3)))


def test_arrays_lie_as_pictures_do(tmp_path):
    """Rows run down (to the back), columns right (to the patient's left), as in a CT slice."""
    stack = np.random.default_rng(0).integers(0, 99, (7, 6, 5)).astype(np.float32)
    for array, seen in ((stack[0], stack[:1]), (stack, stack)):
        np.save(tmp_path / "a.npy", array)
        volume = read_volume(tmp_path / "a.npy")
        assert volume.axes == "LPS" and not volume.has_spacing and np.array_equal(volume.array, seen.T)
    rgba = np.random.default_rng(0).integers(0, 99, (7, 6, 4), np.uint8)
    np.save(tmp_path / "a.npy", rgba)
    assert np.array_equal(read_volume(tmp_path / "a.npy").array[:, :, 0], rgba[..., :3].transpose(1, 0, 2))
    np.save(tmp_path / "soft.npy", stack / 99)
    soft = read_volume(tmp_path / "soft.npy", labels=True, threshold=0.5)
    assert soft.array.dtype == np.uint8 and np.array_equal(soft.array, (stack / 99 > 0.5).T)


def test_training_slices_and_cases_are_volumes_too(tmp_path):
    image, label = np.random.default_rng(0).random((7, 6, 3), np.float32), np.arange(42, dtype=np.uint8).reshape(7, 6)
    write_slice(tmp_path / "a.npz", image, label)
    assert all(np.array_equal(a, b) for a, b in zip(read_slice(tmp_path / "a.npz"), (image, label)))
    assert np.array_equal(read_volume(tmp_path / "a.npz").array[:, :, 0], image.transpose(1, 0, 2))
    assert np.array_equal(read_volume(tmp_path / "a.npz", labels=True).array[:, :, 0], label.T)
    write_slice(tmp_path / "a.npz", image[..., :2], label)
    assert read_volume(tmp_path / "a.npz").array.shape == (6, 7, 1, 2)
    source = oblique((6, 7, 4))
    stack = source.array.T.astype(np.float32)
    case = Case(np.stack([stack, -stack], axis=-1), source.array.T, source.geometry(None, 2))
    write_case(case, tmp_path / "a.npy.h5")
    assert np.array_equal(read_case(tmp_path / "a.npy.h5").image, case.image)
    read = read_volume(tmp_path / "a.npy.h5", labels=True)
    assert np.array_equal(read.array, source.array) and np.array_equal(read.affine, source.affine)
    assert read_volume(tmp_path / "a.npy.h5").array.shape == (6, 7, 4, 2)


@pytest.mark.parametrize("shape", [(4, 7, 6), (4, 7, 6, 3)])
def test_medsam_files_hold_bytes_and_spacing(shape, tmp_path):
    image, label = np.random.default_rng(0).random(shape, np.float32), np.zeros((4, 7, 6), np.int64)
    label[1, 2:4, 3] = 5
    write_medsam(tmp_path / "a.npz", image, label, (0.5, 0.75, 2.5))
    with np.load(tmp_path / "a.npz") as file:
        assert file["imgs"].dtype == file["gts"].dtype == np.uint8 and file["spacing"].tolist() == [0.5, 0.75, 2.5]
        assert np.abs(file["imgs"] - image * 255.0).max() <= 0.5 and np.array_equal(file["gts"], label)
        pixels = file["imgs"]
    read, labels = read_volume(tmp_path / "a.npz"), read_volume(tmp_path / "a.npz", labels=True)
    assert np.array_equal(read.array.swapaxes(0, 2), pixels) and np.array_equal(labels.array.T, label)
    assert read.spacing == labels.spacing == (0.5, 0.75, 2.5) and read.has_spacing and read.axes == "LPS"
    write_medsam(tmp_path / "b.npz", pixels, None, None)
    assert np.array_equal(read_volume(tmp_path / "b.npz").array, read.array)
    assert not read_volume(tmp_path / "b.npz").has_spacing
    for wrong in ((image * 255, label), (image, label * 60), (image, label[:1]), (image[0, 0], None)):
        with pytest.raises(InputError, match="c.npz"):
            write_medsam(tmp_path / "c.npz", *wrong, None)
    assert not (tmp_path / "c.npz").exists()


def test_names_of_cases_have_no_endings():
    assert {stem(f"a/case01{ending.upper()}") for ending in VOLUMES} == {"case01"}
    assert stem("a/1.2.840.5") == "1.2.840.5" and stem(".png") == ".png"


def test_another_grid_is_refused_and_both_are_printed():
    volume = oblique()
    half = np.eye(4) + 0.5 * np.eye(4, k=3)
    shifted = Volume(volume.array, volume.affine @ half, path="shifted.nii")
    other = Volume(volume.array[:-1], volume.affine, path="shorter.nii")
    nearly = Volume(volume.array, volume.affine + 0.001 * np.eye(4, k=3), path="rounded.nii")
    for label in (shifted, other):
        with pytest.raises(InputError) as error:
            match_grid(label, to=volume)
        assert str(error.value).count("spacing") == 2 and label.path in str(error.value)
        assert "oblique" in str(error.value) and "\n" not in str(error.value)
    assert np.array_equal(match_grid(nearly, to=volume).array, volume.array)


def test_labels_may_be_nearly_whole_and_trailing_axes_are_dropped(tmp_path):
    array = np.array([0, 1.0000001, 2.0004, 300], np.float64).reshape(1, 2, 2, 1)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    labels = read_volume(tmp_path / "a.nii.gz", labels=True).array
    assert labels.dtype == np.uint16 and labels.tolist() == [[[0, 1], [2, 300]]]


def test_slices_and_cases_come_back_as_written(tmp_path):
    image, label = np.random.default_rng(0).random((4, 5, 6), np.float32), np.arange(120, dtype=np.uint8)
    label = label.reshape(4, 5, 6)
    write_slice(tmp_path / "a.npz", image[0], label[0])
    read = read_slice(tmp_path / "a.npz")
    assert np.array_equal(read[0], image[0]) and np.array_equal(read[1], label[0])
    geometry = oblique((6, 5, 4)).geometry("LPS", 1)
    write_case(Case(image, label, geometry, {"name": "r"}), tmp_path / "case0001.npy.h5")
    case = read_case(tmp_path / "case0001.npy.h5")
    assert np.array_equal(case.image, image) and np.array_equal(case.label, label)
    assert case.name == "case0001" and case.recipe == {"name": "r"}
    assert np.array_equal(case.affine, geometry.affine) and case.geometry.to_dict() == geometry.to_dict()


def test_threads_read_at_once(tmp_path):
    """Python before 3.11.8 fails in numpy's parser of headers when the garbage collector hands over to another thread."""
    images = np.random.default_rng(0).random((8, 4, 4), np.float32)
    for n, image in enumerate(images):
        write_slice(tmp_path / f"{n}.npz", image, np.zeros((4, 4), np.uint8))

    def hand_over(phase, info):
        sum(range(20_000))

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    gc.callbacks.append(hand_over)
    try:
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(read_slice, [tmp_path / f"{n}.npz" for n in range(8)] * 50))
    finally:
        gc.callbacks.remove(hand_over)
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
    assert all(np.array_equal(read[n][0], images[n % 8]) for n in range(400))


def test_published_files_know_no_geometry(tmp_path):
    with h5py.File(tmp_path / "case0008.npy.h5", "w") as file:
        file["image"], file["label"] = np.zeros((4, 5, 6), np.float64), np.ones((4, 5, 6), np.float32)
    case = read_case(tmp_path / "case0008.npy.h5")
    assert case.affine is None and case.spacing is None and case.recipe is None
    assert case.image.dtype == np.float32 and case.label.dtype == np.uint8
    volume = case_to_volume(case, case.label)
    assert volume.array.shape == (6, 5, 4) and np.array_equal(volume.affine, np.eye(4))
    write_volume(volume, tmp_path / "a.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "a.nii.gz").affine, np.eye(4))


def _nifti(array):
    return lambda path: nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def _truncated(path):
    whole = path.with_name("whole.nii.gz")
    _nifti(np.random.default_rng(0).integers(0, 999, (20, 20, 20), np.int16))(whole)
    path.write_bytes(whole.read_bytes()[:5000])


def _cut(ending):
    def write(path):
        write_volume(Volume(np.random.default_rng(0).integers(0, 999, (20, 20, 20), np.int16), np.eye(4)), path)
        path.write_bytes(path.read_bytes()[:5000])

    return write


def _mha(path, spacing):
    head = f"ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\nElementSpacing = {spacing}\n"
    path.write_bytes(f"{head}ElementDataFile = LOCAL\n".encode() + bytes(range(24)))


def test_a_negative_spacing_runs_the_other_way(tmp_path):
    _mha(tmp_path / "a.mha", "-2 1 1")
    volume = read_volume(tmp_path / "a.mha")
    assert volume.axes == "RPS" and volume.spacing == (2, 1, 1)


def _singular(path):
    image = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4))
    image.header["srow_y"] = image.header["srow_x"]
    image._affine = None
    nibabel.save(image, path)


def _flat(path):
    image = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4))
    image.header["srow_y"] = 0
    image._affine = None
    nibabel.save(image, path)


def _h5(**arrays):
    def write(path):
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array

    return write


ZEROS = np.zeros((3, 3), np.float32)
NAN = np.full((3, 3, 3), np.nan, np.float32)
SLICE, CASE = (read_slice, "x_slice000.npz"), (read_case, "x.npy.h5")
VOLUME, LABEL = (read_volume, "x.nii.gz"), (lambda path: read_volume(path, labels=True), "x.nii.gz")
NPY_LABEL, NPZ_LABEL = (LABEL[0], "x.npy"), (LABEL[0], "x.npz")
BROKEN = {
    "truncated gzip": (*VOLUME, _truncated, "cannot be read"),
    "text named nii.gz": (*VOLUME, lambda p: p.write_text("not an image\n"), "cannot be read"),
    "gzipped text": (*VOLUME, lambda p: p.write_bytes(gzip.compress(b"no image" * 99)), "cannot be read"),
    "empty file": (*VOLUME, lambda p: p.write_bytes(b""), "cannot be read"),
    "no file": (*VOLUME, lambda p: None, "no such file"),
    "1D": (*VOLUME, _nifti(ZEROS[0]), "three axes"),
    "5D": (*VOLUME, _nifti(np.zeros((3, 3, 3, 2, 2), np.int16)), "(3, 3, 3, 2, 2)"),
    "4D labels": (*LABEL, _nifti(np.zeros((3, 3, 3, 2), np.int16)), "(3, 3, 3, 2)"),
    "coloured labels": (*LABEL, _nifti(np.zeros((3, 3, 3), [(c, np.uint8) for c in "RGB"])), "three axes"),
    "no voxels": (*VOLUME, _nifti(ZEROS[:, :0, None]), "three axes"),
    "NaN": (*VOLUME, _nifti(NAN), "NaN"),
    "complex": (*VOLUME, _nifti(np.zeros((3, 3, 3), np.complex64)), "complex64"),
    "singular affine": (*VOLUME, _singular, "affine"),
    "voxels of no width": (*VOLUME, _flat, "affine"),
    "fractions": (*LABEL, _nifti(np.full((3, 3, 3), 0.5, np.float32)), "0.5"),
    "huge labels": (*LABEL, _nifti(np.full((3, 3, 3), 70000, np.int32)), "70000"),
    "unknown ending": (read_volume, "x.docx", lambda p: p.write_text(""), ".nii.gz"),
    "text named nrrd": (read_volume, "x.nrrd", lambda p: p.write_text("no"), "cannot be read"),
    "no spacing in mha": (read_volume, "x.mha", lambda p: _mha(p, "0 1 1"), "cannot be read as MHA"),
    "truncated nrrd": (read_volume, "x.nrrd", _cut(".nrrd"), "cannot be read"),
    "truncated mha": (read_volume, "x.mha", _cut(".mha"), "cannot be read"),
    "object npy": (read_volume, "x.npy", lambda p: np.save(p, np.array([{}, None])), "cannot be read"),
    "text in npy": (read_volume, "x.npy", lambda p: np.save(p, np.array([["a"]])), "numbers"),
    "5D npy": (read_volume, "x.npy", lambda p: np.save(p, NAN[None, None]), "(1, 1, 3, 3, 3)"),
    "NaN npy": (read_volume, "x.npy", lambda p: np.save(p, NAN), "NaN"),
    "colour npy labels": (*NPY_LABEL, lambda p: np.save(p, np.zeros((9, 9, 3), np.uint8)), "(9, 9, 1, 3)"),
    "truncated npy": (read_volume, "x.npy", lambda p: p.write_bytes(b"\x93NUMPY\1\0v\0{'descr'"), "cannot be read"),
    "npz without labels": (*NPZ_LABEL, lambda p: np.savez(p, imgs=ZEROS), "found: imgs"),
    "MedSAM spacing": (read_volume, "x.npz", lambda p: np.savez(p, imgs=NAN * 0, spacing=[1, 0, 1]), "spacing"),
    "h5 without labels": (lambda p: read_volume(p, labels=True), "x.h5", _h5(image=ZEROS), "'label'"),
    "folder without DICOM": (read_volume, "x", lambda p: p.mkdir(), "DICOM"),
    "bad zip": (*SLICE, lambda p: p.write_bytes(b"PK\3\4 broken"), "cannot be read"),
    "empty npz": (*SLICE, lambda p: p.write_bytes(b""), "cannot be read"),
    "no slice": (*SLICE, lambda p: None, "no such file"),
    "single array": (*SLICE, lambda p: np.save(p.open("wb"), ZEROS), "single array"),
    "no label": (*SLICE, lambda p: np.savez(p, image=ZEROS), "'label'"),
    "other keys": (*SLICE, lambda p: np.savez(p, imgs=ZEROS, gts=ZEROS), "imgs gts"),
    "objects": (*SLICE, lambda p: np.savez(p, image=ZEROS, label=np.array([{}, None])), "cannot be read"),
    "text array": (*SLICE, lambda p: np.savez(p, image=ZEROS, label=np.array(["a"])), "numbers"),
    "3D slice": (*SLICE, lambda p: np.savez(p, image=NAN, label=NAN), "2 axes"),
    "no pixels": (*SLICE, lambda p: np.savez(p, image=ZEROS[:0], label=ZEROS[:0]), "none empty"),
    "NaN slice": (*SLICE, lambda p: np.savez(p, image=ZEROS * np.nan, label=ZEROS), "NaN"),
    "sizes differ": (*SLICE, lambda p: np.savez(p, image=ZEROS, label=ZEROS[:2]), "(2, 3)"),
    "soft label": (*SLICE, lambda p: np.savez(p, image=ZEROS, label=ZEROS + 0.25), "0.25"),
    "bad h5": (*CASE, lambda p: p.write_bytes(b"no h5"), "cannot be read"),
    "h5 without image": (*CASE, _h5(label=ZEROS), "'image'"),
    "2D case": (*CASE, _h5(image=ZEROS, label=ZEROS), "3 axes"),
    "case sizes differ": (*CASE, _h5(image=ZEROS[None], label=ZEROS[None, :2]), "(1, 2, 3)"),
    "h5 text": (*CASE, _h5(image="text", label=ZEROS[None]), "numbers"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named_in_one_line(kind, tmp_path):
    read, name, write, said = BROKEN[kind]
    path = tmp_path / name
    write(path)
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message and said in message and "\n" not in message, message
    assert isinstance(error.value, MissingFileError) == ("no such" in message)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("")
    for path, volume in (
        (tmp_path / "a.docx", oblique()),
        (tmp_path / "file" / "a.nii.gz", oblique()),
        (tmp_path / "a.nrrd", Volume(np.zeros((2, 2, 2), np.uint8), np.eye(4) + np.eye(4, k=1) * 0.5)),
        (tmp_path / "a.png", oblique()),
        (tmp_path / "b.png", Volume(np.zeros((2, 2, 1), np.float32), np.eye(4))),
        (tmp_path / "a.bmp", Volume(np.full((2, 2, 1), 300), np.eye(4))),
    ):
        with pytest.raises(InputError, match=path.name):
            write_volume(volume, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.real
def test_a_dicom_series_lies_under_its_nifti_labels(real_data):
    image = read_volume(real_data / "dicom_ct" / "example_ct_dicom")
    label = read_volume(real_data / "dicom_ct" / "example_seg_dicom.nii.gz", labels=True)
    assert (image.axes, label.axes, image.spacing) == ("LPS", "LAS", (0.9765625, 0.9765625, 2.0))
    matched = match_grid(label, to=image)
    assert abs(image.array[matched.array == 5].mean() - 89.3) < 0.5


@pytest.mark.real
def test_nrrd_and_big_endian_volumes(real_data):
    image = read_volume(real_data / "mr" / "brain_tumour" / "brain1_image.nrrd")
    label = read_volume(real_data / "mr" / "brain_tumour" / "brain1_label.nrrd", labels=True)
    assert image.array.shape == (256, 256, 25) and label.array.sum() == 4137
    assert np.flatnonzero(match_grid(label, to=image).array.any((0, 1))).tolist() == list(range(11, 18))
    small = read_volume(real_data / "mr" / "tiny_big_endian" / "anatomical.nii")
    assert small.array.dtype.isnative and small.array.max() == 30393


@pytest.mark.real
def test_a_dicom_series_with_a_slice_missing_is_refused(real_data, tmp_path):
    files = sorted((real_data / "dicom_ct" / "example_ct_dicom").iterdir())
    for file in files[:8] + files[9:]:
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(InputError, match="4 mm between .* a slice is missing"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    "axes, flip_ud, flip_lr", [("RAS", True, True), ("LPS", False, False), ("LAS", True, False), ("RPS", False, True)]
)
def test_slices_are_shown_front_up_and_the_right_side_left(axes, flip_ud, flip_lr):
    volume = reorient(Volume(np.zeros((4, 6, 5)), np.diag([1.0, 2.0, 3.0, 1.0])), axes)
    case = Case(np.zeros((5, 6, 4)), None, volume.geometry(None, 2))
    assert case.display == {"flip_ud": flip_ud, "flip_lr": flip_lr, "aspect": 2.0}
    assert Case(np.zeros((5, 6, 4))).display == {"flip_ud": False, "flip_lr": False, "aspect": 1.0}


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_cropped_slices_find_back_onto_the_whole_grid(axes, slice_axis):
    array = np.zeros((6, 7, 8), np.uint8)
    array[2:4, 3:5, 2:6] = np.arange(1, 17).reshape(2, 2, 4)
    volume = Volume(array, np.diag([1.0, 2.0, 3.0, 1.0]))
    turned = reorient(volume, axes)
    stack = turned.array.transpose((slice_axis, *(a for a in (2, 1, 0) if a != slice_axis)))
    rows, columns = (np.flatnonzero(stack.any(axis=axis)) for axis in ((0, 2), (0, 1)))
    box = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    geometry = dataclasses.replace(volume.geometry(axes, slice_axis), box=box)
    assert Geometry.from_dict(geometry.to_dict()).box == box
    cropped = stack[:, box[0] : box[1], box[2] : box[3]]
    back = case_to_volume(Case(cropped, None, geometry), cropped)
    assert np.array_equal(back.array, array) and np.array_equal(back.affine, volume.affine)
