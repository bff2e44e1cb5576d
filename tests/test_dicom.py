"""DICOM: slices lie where their headers say, series are kept apart, segmentations lie on their slices."""

import dataclasses
import itertools
import random

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset

from samlora.colours import class_colour
from samlora.data.grid import Volume, match_grid, reorient
from samlora.data.volume import list_series, read_volume, write_dicom_seg, write_volume
from samlora.errors import InputError

RNG = np.random.default_rng(0)
AXIAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)
OBLIQUE = (0.8, 0.6, 0, -0.48, 0.64, -0.6)
STACK = RNG.integers(0, 3000, (6, 8, 10)).astype(np.uint16)  # (slice, row, column)
MASK = RNG.integers(0, 4, (6, 8, 10)).astype(np.uint8)
MASK[0] = MASK[5] = 0


def write_file(path, pixels, kind="CTImageStorage", **tags) -> None:
    """A DICOM file of gray (rows, columns), frames of it, or RGB (rows, columns, 3), as pydicom writes it."""
    data, colours = Dataset(), pixels.shape[-1] == 3
    data.SOPClassUID = getattr(pydicom.uid, kind)
    data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.1", "1.2.1.1", "1.2.1.9"
    data.Modality, data.SeriesDescription, data.PatientID, data.PatientName = "CT", "abdomen", "7", "A^B"
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if colours else (1, "MONOCHROME2")
    if colours:
        data.PlanarConfiguration = 0
    if pixels.ndim > 2 + colours:
        data.NumberOfFrames = len(pixels)
    data.Rows, data.Columns = pixels.shape[:-1][-2:] if colours else pixels.shape[-2:]
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for key, value in tags.items():
        setattr(data, key, value)
    data.HighBit = data.BitsStored - 1
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = getattr(pydicom.uid, kind)
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID or pydicom.uid.generate_uid()
    data.save_as(path, enforce_file_format=True)


def write_series(folder, stack=STACK, directions=AXIAL, spacing=(0.5, 0.75), step=2.5, prefix="", **tags) -> np.ndarray:
    """One file per slice; names, numbers, thickness and given distance mislead. Returns the affine that is meant (RAS)."""
    folder.mkdir(exist_ok=True)
    normal = np.cross(directions[:3], directions[3:])
    names = list(range(len(stack)))
    random.Random(1).shuffle(names)
    for n, pixels in enumerate(stack):
        place = np.array([-20.0, 30.5, 100.0]) + n * step * normal
        own = {"ImagePositionPatient": place.tolist(), "ImageOrientationPatient": list(directions)}
        own |= {
            "PixelSpacing": list(spacing),
            "SliceThickness": 3,
            "SpacingBetweenSlices": 7,
            "InstanceNumber": 99 - names[n],
        }
        own |= {"RescaleSlope": 1, "RescaleIntercept": -1024} | tags
        write_file(folder / f"{prefix}IM{names[n]:03d}", pixels, **own)
    affine = np.eye(4)
    affine[:3, 0] = np.array(directions[:3]) * spacing[1]
    affine[:3, 1] = np.array(directions[3:]) * spacing[0]
    affine[:3, 2], affine[:3, 3] = normal * step, (-20.0, 30.5, 100.0)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def change(path, **tags) -> None:
    """Sets tags of a file; None removes one."""
    data = pydicom.dcmread(path)
    for key, value in tags.items():
        delattr(data, key) if value is None else setattr(data, key, value)
    data.save_as(path)


def enhanced(path, heights, spacing=(0.5, 0.75)) -> None:
    """An enhanced CT: all slices in one file, one frame each, at these heights."""
    measures, directions, values = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(spacing), 9
    directions.ImageOrientationPatient = list(AXIAL)
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1024, "HU"
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [directions]
    shared.PixelValueTransformationSequence = [values]
    for height in heights:
        place, frame = Dataset(), Dataset()
        place.ImagePositionPatient = [-20, 30.5, height]
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    write_file(path, STACK[: len(heights)], "EnhancedCTImageStorage", **groups)


@pytest.mark.parametrize("directions", [AXIAL, SAGITTAL, OBLIQUE])
@pytest.mark.parametrize("step", [2.5, -2.5])
def test_slices_lie_where_their_headers_say(directions, step, tmp_path):
    affine = write_series(tmp_path / "s", directions=directions, step=step)
    (tmp_path / "s" / ".DS_Store").write_text("x")
    (tmp_path / "s" / "notes.txt").write_text("x" * 500)
    meant = Volume(STACK.T.astype(np.int32) - 1024, affine)
    read = read_volume(tmp_path / "s")
    assert np.array_equal(match_grid(read, to=meant).array, meant.array)  # also with the slices downwards
    assert read.spacing == pytest.approx((0.75, 0.5, 2.5)) and read.has_spacing
    assert np.linalg.det(read.affine) > 0  # always stacked along the normal
    (series,) = list_series(tmp_path / "s")
    assert series.size == (10, 8, 6) and series.uid == "1.2.1.1" and series.modality == "CT"
    assert [pydicom.dcmread(f).pixel_array.tolist() for f in series.files] == STACK[
        :: np.sign(step).astype(int)
    ].tolist()


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    for number, uid, name in ((2, "1.2.1.2", "liver art"), (1, "1.2.1.1", "liver"), (3, "1.2.1.3", "scout")):
        write_series(
            tmp_path,
            STACK + number,
            prefix=name[-3:],
            SeriesNumber=number,
            SeriesInstanceUID=uid,
            SeriesDescription=name,
        )
    with pytest.raises(InputError) as error:
        read_volume(tmp_path)
    said = str(error.value)
    assert (
        "3 DICOM series: 1 = 1.2.1.1 'liver', CT, 6 slices of 10 x 8; 2 = 1.2.1.2 'liver art'" in said
        and "--series" in said
    )
    assert "\n" not in said
    for chosen, number in ((2, 2), ("3", 3), ("1.2.1.2", 2), ("Liver", 1), ("art", 2), ("1.3", 3)):
        assert np.array_equal(read_volume(tmp_path, series=chosen).array + 1024, STACK.T + number)
    for wrong, count in (("live", "2"), ("4", "none"), ("bone", "none"), ("", "none"), (0, "none")):
        with pytest.raises(InputError, match=f"fits {count} of its series: 1 = "):
            read_volume(tmp_path, series=wrong)


@pytest.mark.parametrize(
    "tags, said",
    [
        (dict(Rows=4, Columns=20), "size 20 x 4 in bIM"),
        (dict(spacing=(0.5, 0.8)), "pixel spacing 0.8 0.5 in bIM.*, not 0.75 0.5 as in IM"),
        (dict(directions=SAGITTAL), "orientation 0 1 0 0 0 -1 in bIM"),
        (dict(ImagePositionPatient=None), "no place in bIM"),
        (dict(SeriesDescription="other"), ""),
        (dict(FrameOfReferenceUID="1.2.1.8"), ""),
    ],
)
def test_series_without_uids_are_not_mixed(tags, said, tmp_path):
    write_series(tmp_path, SeriesInstanceUID="", SOPInstanceUID="")
    write_series(tmp_path, STACK + 1, prefix="b", **{"SeriesInstanceUID": "", **tags})
    first, *others = list_series(tmp_path)
    assert len(others) == (1 if "no place" not in said else 6) and first.uid == ""
    with pytest.raises(InputError, match=r"series: 1 = \(no UID\) 'abdomen', CT.*" + said):
        read_volume(tmp_path)
    assert {tuple(f.name[0] for f in s.files) for s in (first, *others)} <= {("I",) * 6, ("b",) * 6, ("b",)}
    assert np.array_equal(
        read_volume(tmp_path, series=1).array, STACK.T.astype(int) - 1024 + (first.files[0].name[0] == "b")
    )


@pytest.mark.parametrize("characters, name", [("ISO_IR 100", "Schädel"), ("GB18030", "头部"), ("ISO_IR 192", "头部")])
def test_series_may_be_named_in_any_language(characters, name, tmp_path):
    for number, text in enumerate((name, "other"), start=1):
        tags = dict(SpecificCharacterSet=characters, SeriesDescription=text, SeriesInstanceUID=f"1.2.{number}")
        write_series(tmp_path, STACK + number, prefix=text[0], SeriesNumber=number, **tags)
    assert [series.description for series in list_series(tmp_path)] == [name, "other"]
    assert np.array_equal(read_volume(tmp_path, series=name).array + 1024, STACK.T + 1)


def test_slices_that_make_no_grid_are_refused(tmp_path):
    def refused(said, name, **tags):
        folder = tmp_path / name
        write_series(folder)
        change(folder / "IM000", **tags)
        with pytest.raises(InputError, match=said) as error:
            read_volume(folder)
        assert "\n" not in str(error.value)

    position = pydicom.dcmread(write_series(tmp_path / "x") is None or tmp_path / "x" / "IM001").ImagePositionPatient
    refused("lie at the same place", "double", ImagePositionPatient=list(position))
    refused("5 mm between .*IM.* a slice is missing", "gap", ImagePositionPatient=[-20, 30.5, 100 + 6 * 2.5 + 2.5])
    refused("IM000.*pixel spacing|pixel spacing.*IM000", "spacing", PixelSpacing=[0.6, 0.75])
    refused("IM000", "turned", ImageOrientationPatient=list(SAGITTAL))
    refused("IM000.*right angles", "skewed", ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    refused("IM000.*cannot be read", "text", PixelSpacing="0.5")
    folder = tmp_path / "tilted"
    write_series(folder)
    for file in folder.iterdir():
        x, y, z = pydicom.dcmread(file).ImagePositionPatient
        change(file, ImagePositionPatient=[x, y + (z - 100) * np.tan(np.radians(15)), z])
    with pytest.raises(InputError, match="tilted by 15 degrees.*dcm2niix"):
        read_volume(folder)


@pytest.mark.parametrize("left", [1700, 900, 400, 200])
def test_a_slice_cut_short_is_named(left, tmp_path):
    write_series(tmp_path, RNG.integers(0, 99, (3, 32, 32)).astype(np.uint16))
    (tmp_path / "IM001").write_bytes((tmp_path / "IM001").read_bytes()[:left])
    for path in (tmp_path, tmp_path / "IM001"):
        with pytest.raises(InputError, match="IM001: cannot be read as DICOM"):
            read_volume(path)


def test_other_objects_in_the_folder_are_passed_over(tmp_path):
    write_series(tmp_path)
    plan = pydicom.dcmread(tmp_path / "IM000")
    del plan.PixelData
    for name, kind in (("DICOMDIR", "MediaStorageDirectoryStorage"), ("plan.dcm", "RTStructureSetStorage")):
        plan.SOPClassUID = plan.file_meta.MediaStorageSOPClassUID = getattr(pydicom.uid, kind)
        plan.save_as(tmp_path / name)
    assert read_volume(tmp_path).array.shape == (10, 8, 6)
    with pytest.raises(InputError, match="plan.dcm: no DICOM image"):
        read_volume(tmp_path / "plan.dcm")
    (tmp_path / "sub").mkdir()
    with pytest.raises(InputError, match="sub: no DICOM series"):
        read_volume(tmp_path / "sub")


def test_one_file_is_a_volume(tmp_path):
    write_series(tmp_path)
    one = read_volume(next(tmp_path.iterdir()), series="of folders only")
    assert one.array.shape == (10, 8, 1) and one.spacing == pytest.approx((0.75, 0.5, 3)) and one.has_spacing
    colour = RNG.integers(0, 255, (8, 10, 3), np.uint8)
    write_file(tmp_path / "photo.dcm", colour, "SecondaryCaptureImageStorage", Modality="OT")
    photo = read_volume(tmp_path / "photo.dcm")
    assert np.array_equal(photo.array[:, :, 0], colour.transpose(1, 0, 2)) and not photo.has_spacing
    assert np.array_equal(photo.affine, np.diag([-1, -1, 1, 1]))  # as of any picture
    film = np.stack([colour, colour[::-1]])
    write_file(tmp_path / "film.dcm", film, "UltrasoundMultiFrameImageStorage", Modality="US")
    assert np.array_equal(read_volume(tmp_path / "film.dcm").array, film.transpose(2, 1, 0, 3))
    write_file(tmp_path / "xray.dcm", STACK[0], "DigitalXRayImageStorageForPresentation", ImagerPixelSpacing=[0.1, 0.2])
    xray = read_volume(tmp_path / "xray.dcm")
    assert xray.spacing == pytest.approx((0.2, 0.1, 1)) and xray.has_spacing
    change(tmp_path / "xray.dcm", PixelSpacing=[0.05, 0.15])  # calibrated: at the patient, not at the detector
    assert read_volume(tmp_path / "xray.dcm").spacing == pytest.approx((0.15, 0.05, 1))


@pytest.mark.parametrize("slope, intercept", [(1, 0), (2, -5)])
def test_inverted_gray_is_turned_bright_side_up(slope, intercept, tmp_path):
    tags = dict(PhotometricInterpretation="MONOCHROME1", BitsStored=12, RescaleSlope=slope, RescaleIntercept=intercept)
    write_series(tmp_path, **tags)
    assert np.array_equal(read_volume(tmp_path).array, (4095 - STACK.T.astype(int)) * slope + intercept)


def test_slopes_of_each_slice_are_its_own(tmp_path):
    write_series(tmp_path)
    for n, series in enumerate(list_series(tmp_path)[0].files):
        change(series, RescaleSlope=1 + n / 4, RescaleIntercept=n)
    meant = STACK * (1 + np.arange(6) / 4)[:, None, None] + np.arange(6)[:, None, None]
    assert np.array_equal(read_volume(tmp_path).array, meant.T)


def test_frames_of_an_enhanced_file_lie_where_they_say(tmp_path):
    enhanced(tmp_path / "up.dcm", [100, 103, 106, 109])
    enhanced(tmp_path / "down.dcm", [109, 106, 103, 100])
    up, down = (read_volume(tmp_path / f"{name}.dcm") for name in ("up", "down"))
    assert up.spacing == down.spacing == pytest.approx((0.75, 0.5, 3)) and up.has_spacing
    assert np.array_equal(up.array, STACK[:4].T.astype(int) - 1024)
    assert np.array_equal(match_grid(down, to=up).array, up.array[:, :, ::-1])
    enhanced(tmp_path / "cubes.dcm", [100, 101, 102, 103], (1, 1))
    assert read_volume(tmp_path / "cubes.dcm").spacing == (1, 1, 1)
    for heights in ([100, 103, 109, 112], [100, 106, 103, 109]):
        enhanced(tmp_path / "uneven.dcm", heights)
        with pytest.raises(InputError, match="uneven.dcm: its frames do not follow .* dcm2niix"):
            read_volume(tmp_path / "uneven.dcm")


NAMES = ["liver", "spleen", "left kidney", "never there"]


def places_of_frames(path):
    """(segment number or None, ImagePositionPatient, pixels) of every frame, as pydicom reads them."""
    data = pydicom.dcmread(path)
    frames = data.pixel_array.reshape(-1, data.Rows, data.Columns)
    for group, pixels in zip(data.PerFrameFunctionalGroupsSequence, frames):
        segment = (
            group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            if "SegmentIdentificationSequence" in group
            else None
        )
        yield segment, tuple(group.PlanePositionSequence[0].ImagePositionPatient), pixels


def labels_of(image: Volume, array=None) -> Volume:
    return dataclasses.replace(image, array=MASK.T if array is None else array)


@pytest.mark.parametrize("directions", [AXIAL, OBLIQUE])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_segmentations_lie_on_their_slices(kind, directions, tmp_path):
    write_series(tmp_path / "ct", directions=directions)
    labels, path = labels_of(read_volume(tmp_path / "ct")), tmp_path / "seg.dcm"
    write_dicom_seg(labels, tmp_path / "ct", path, NAMES, kind=kind, algorithm="net", version="3")
    (series,) = list_series(tmp_path / "ct")
    slices = [pydicom.dcmread(file) for file in series.files]
    at = {tuple(data.ImagePositionPatient): n for n, data in enumerate(slices)}
    frames = list(places_of_frames(path))
    assert len(frames) == 6 * (1 if kind == "LABELMAP" else len(NAMES))
    for segment, place, pixels in frames:
        truth = MASK[at[place]]
        assert np.array_equal(pixels if segment is None else pixels > 0, truth if segment is None else truth == segment)
    data = pydicom.dcmread(path)
    described = [item for item in data.SegmentSequence if item.SegmentNumber]
    assert [(item.SegmentNumber, item.SegmentLabel) for item in described] == list(enumerate(NAMES, start=1))
    assert len({tuple(item.RecommendedDisplayCIELabValue) for item in described}) == len(NAMES)
    assert (data.PatientID, data.StudyInstanceUID, data.FrameOfReferenceUID) == ("7", "1.2.1", "1.2.1.9")
    assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.1.1" != data.SeriesInstanceUID
    referenced = {item.ReferencedSOPInstanceUID for item in data.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referenced == {item.SOPInstanceUID for item in slices}
    measures = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SpacingBetweenSlices == 2.5 and measures.SliceThickness == 3
    read = read_volume(path, labels=True)
    assert np.array_equal(read.array, MASK.T) and np.allclose(read.affine, labels.affine)


SCRIPTS = [
    (None, "A^B"),
    ("ISO_IR 100", "Müller^Jürgen"),
    ("ISO_IR 144", "Люксембург"),
    (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    ("GB18030", "Wang^XiaoDong=王^小东"),
    ("ISO_IR 192", "Ü^肝"),
]


@pytest.mark.parametrize("characters, patient", SCRIPTS, ids=[str(script[0]) for script in SCRIPTS])
def test_names_in_any_script_read_back_exactly(characters, patient, tmp_path):
    """Whatever character set the source has: names of classes, and what is copied from it, within sequences too."""
    import highdicom

    text, code, person = patient.split("=")[-1], Dataset(), Dataset()
    code.CodeMeaning, code.CodeValue, code.CodingSchemeDesignator = text, "1", "99TEST"
    person.InstitutionName, person.PersonIdentificationCodeSequence = text, [code]
    tags = dict(PatientName=patient, ReferringPhysicianName=patient, StudyDescription=text)
    nested = dict(ProcedureCodeSequence=[code], ReferringPhysicianIdentificationSequence=[person])
    write_series(tmp_path / "ct", SpecificCharacterSet=characters, **tags, **nested)
    names, path = ["肝", "печень", "Milz ä", "é" * 70, "a\\b"], tmp_path / "seg.dcm"
    write_dicom_seg(labels_of(read_volume(tmp_path / "ct")), tmp_path / "ct", path, names)
    for read in (pydicom.dcmread, highdicom.seg.segread):
        data = read(path)
        assert [item.SegmentLabel for item in data.SegmentSequence] == [name.replace("\\", "/")[:64] for name in names]
        assert data.SpecificCharacterSet == "ISO_IR 192"
        assert {key: str(data[key].value) for key in tags} == tags
        assert data.ProcedureCodeSequence[0].CodeMeaning == text
        (identified,) = data.ReferringPhysicianIdentificationSequence
        assert identified.InstitutionName == identified.PersonIdentificationCodeSequence[0].CodeMeaning == text


@pytest.mark.parametrize("way", ["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"])
def test_segments_say_who_drew_them(way, tmp_path):
    write_series(tmp_path / "ct")
    labels = labels_of(read_volume(tmp_path / "ct"))
    write_dicom_seg(labels, tmp_path / "ct", tmp_path / "seg.dcm", NAMES, algorithm="net", algorithm_type=way)
    for item in pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence:
        assert item.SegmentAlgorithmType == way
        named = {"SegmentAlgorithmName", "SegmentationAlgorithmIdentificationSequence"} & set(item.dir())
        assert len(named) == (0 if way == "MANUAL" else 2)
        assert item.get("SegmentAlgorithmName") == (None if way == "MANUAL" else "net")


def test_segments_have_the_colours_of_their_classes(tmp_path):
    import highdicom

    write_series(tmp_path / "ct")
    write_dicom_seg(labels_of(read_volume(tmp_path / "ct")), tmp_path / "ct", tmp_path / "seg.dcm", NAMES)
    for item in pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence:
        shown = highdicom.color.CIELabColor.from_dicom_value(list(item.RecommendedDisplayCIELabValue)).to_rgb(clip=True)
        assert shown == pytest.approx([255 * part for part in class_colour(item.SegmentNumber)], abs=2)


def test_segmentations_of_turned_and_empty_labels(tmp_path):
    write_series(tmp_path / "ct")
    image, path = read_volume(tmp_path / "ct"), tmp_path / "ct" / "seg.dcm"
    write_dicom_seg(reorient(labels_of(image), "PIR"), tmp_path / "ct", path, NAMES)
    assert np.array_equal(read_volume(path, labels=True).array, MASK.T)
    assert np.array_equal(read_volume(tmp_path / "ct", labels=True).array, MASK.T)  # the one beside its slices
    assert np.array_equal(read_volume(tmp_path / "ct").array, image.array)  # and the slices beside it
    write_dicom_seg(labels_of(image, 0 * image.array), tmp_path / "ct", tmp_path / "empty.dcm", NAMES[:1])
    assert read_volume(tmp_path / "empty.dcm", labels=True).array.shape == image.array.shape
    path.rename(tmp_path / "ct" / "one.dcm").with_name("two.dcm").write_bytes(
        (tmp_path / "ct" / "one.dcm").read_bytes()
    )
    with pytest.raises(InputError, match="2 DICOM segmentations in it"):
        read_volume(tmp_path / "ct", labels=True)


def test_only_the_chosen_series_is_segmented(tmp_path):
    write_series(tmp_path)
    write_series(tmp_path, STACK[:3], prefix="b", step=5, SeriesInstanceUID="1.2.1.2", SeriesNumber=4)
    image = read_volume(tmp_path, series=2)
    labels = labels_of(image, MASK.T[:, :, :3])
    write_dicom_seg(labels, tmp_path, tmp_path / "out" / "seg.dcm", NAMES, series="1.2.1.2")
    data = pydicom.dcmread(tmp_path / "out" / "seg.dcm")
    assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.1.2"
    for series in (1, None):
        with pytest.raises(InputError, match="its grid|2 DICOM series"):
            write_dicom_seg(labels, tmp_path, tmp_path / "wrong.dcm", NAMES, series=series)
    assert not (tmp_path / "wrong.dcm").exists()


def test_anonymised_series_can_be_segmented(tmp_path):
    """Without UIDs of study, series, frame of reference and instances: two files refer to the same made-up ones."""
    bare = dict(SeriesInstanceUID="", StudyInstanceUID="", SOPInstanceUID="", FrameOfReferenceUID=None, SOPClassUID="")
    write_series(tmp_path / "ct", PatientID=None, PatientName="", SliceThickness=None, **bare)
    before = {file: file.read_bytes() for file in (tmp_path / "ct").iterdir()}
    labels = labels_of(read_volume(tmp_path / "ct"))
    for name in ("a.dcm", "b.dcm"):
        write_dicom_seg(labels, tmp_path / "ct", tmp_path / name, NAMES)
        assert np.array_equal(read_volume(tmp_path / name, labels=True).array, MASK.T)
    a, b = (pydicom.dcmread(tmp_path / name) for name in ("a.dcm", "b.dcm"))
    for key in ("StudyInstanceUID", "FrameOfReferenceUID", "ReferencedSeriesSequence"):
        assert a[key] == b[key] and a[key].value
    assert a.SOPInstanceUID != b.SOPInstanceUID
    assert before == {file: file.read_bytes() for file in (tmp_path / "ct").iterdir()}


def test_single_files_can_be_segmented(tmp_path):
    enhanced(tmp_path / "enhanced.dcm", [109, 106, 103, 100])
    write_file(tmp_path / "xray.dcm", STACK[0], "DigitalXRayImageStorageForPresentation", PixelSpacing=[0.1, 0.2])
    for name, mask in (("enhanced", MASK[1:5]), ("xray", MASK[1:2])):
        source, seg = tmp_path / f"{name}.dcm", tmp_path / f"{name}_seg.dcm"
        labels = labels_of(read_volume(source), mask.T)
        write_dicom_seg(labels, source, seg, NAMES)
        pixels = pydicom.dcmread(seg).pixel_array.reshape(len(NAMES), len(mask), 8, 10)
        if name == "enhanced":
            assert np.array_equal(match_grid(read_volume(seg, labels=True), to=labels).array, mask.T)
        else:
            assert np.array_equal((pixels * np.arange(1, 5)[:, None, None, None]).sum(axis=0), mask)


def test_segmentations_that_cannot_be_are_refused(tmp_path, monkeypatch):
    write_series(tmp_path / "ct")
    labels = labels_of(read_volume(tmp_path / "ct"))
    shifted = dataclasses.replace(labels, affine=labels.affine + np.eye(4, k=3))
    for wrong, names, kind, said in (
        (shifted, NAMES, "BINARY", "its grid"),
        (labels, NAMES[:2], "BINARY", "labels 0..3, but 2 class names"),
        (labels, NAMES, "MASKS", "allowed is BINARY, FRACTIONAL, LABELMAP"),
    ):
        with pytest.raises(InputError, match=said):
            write_dicom_seg(wrong, tmp_path / "ct", tmp_path / "a.dcm", names, kind=kind)
    with pytest.raises(InputError, match="allowed is AUTOMATIC, SEMIAUTOMATIC, MANUAL"):
        write_dicom_seg(labels, tmp_path / "ct", tmp_path / "a.dcm", NAMES, algorithm_type="manual")
    write_dicom_seg(labels, tmp_path / "ct", tmp_path / "b.dcm", NAMES)
    data = pydicom.dcmread(tmp_path / "b.dcm")
    data.PixelData = bytes(len(data.PixelData)).replace(b"\0", b"\xff")  # every segment everywhere
    data.save_as(tmp_path / "overlap.dcm")
    with pytest.raises(InputError, match="overlap.dcm: .*overlap"):
        read_volume(tmp_path / "overlap.dcm", labels=True)
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    for call in (
        lambda: write_dicom_seg(labels, tmp_path / "ct", tmp_path / "a.dcm", NAMES),
        lambda: read_volume(tmp_path / "b.dcm", labels=True),
    ):
        with pytest.raises(InputError, match=r"pip install 'samlora\[dicom\]'"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.dcm", "ct", "overlap.dcm"]


def test_slices_without_frames_are_empty(tmp_path):
    """As other programs write them: only the frames in which a segment has pixels."""
    import highdicom

    write_series(tmp_path / "ct")
    labels = labels_of(read_volume(tmp_path / "ct"), np.where(np.arange(6) == 3, 0, MASK.T))
    write_dicom_seg(labels, tmp_path / "ct", tmp_path / "all.dcm", NAMES)
    descriptions = highdicom.seg.segread(tmp_path / "all.dcm").SegmentSequence
    source = [pydicom.dcmread(file) for file in list_series(tmp_path / "ct")[0].files]
    for data in source:
        data.SpacingBetweenSlices = 2.5
    for data, key in itertools.product(source, ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID")):
        data.setdefault(key, "")
        data.StudyDate = data.StudyTime = None
    uids = [highdicom.UID(), 1, highdicom.UID(), 1]
    sparse = highdicom.seg.Segmentation(
        source, labels.array.T.copy(), "BINARY", descriptions, *uids, "m", "m", "1", "1", omit_empty_frames=True
    )
    sparse.save_as(tmp_path / "sparse.dcm")
    read = read_volume(tmp_path / "sparse.dcm", labels=True)
    assert np.array_equal(read.array, labels.array[:, :, 1:5])  # what lies outside, the file does not tell
    assert read.affine[:3, 3] == pytest.approx(labels.affine[:3, 3] + labels.affine[:3, 2])


@pytest.mark.real
def test_a_real_series_and_its_segmentation(real_data, tmp_path):
    folder = real_data / "dicom_ct" / "example_ct_dicom"
    image = read_volume(folder)
    label = match_grid(read_volume(real_data / "dicom_ct" / "example_seg_dicom.nii.gz", labels=True), to=image)
    (series,) = list_series(folder)
    assert series.size == (512, 512, 20) and series.uid == "" and series.description == "CT Body 3.0"
    organs = np.zeros_like(label.array)
    for number, value in enumerate((5, 1, 6), start=1):
        organs[label.array == value] = number
    assert abs(image.array[organs == 1].mean() - 89.3) < 0.05
    for name in ("a.dcm", "b.dcm"):
        write_dicom_seg(labels_of(image, organs), folder, tmp_path / name, ["liver", "spleen", "stomach"])
    read = read_volume(tmp_path / "a.dcm", labels=True)
    assert np.array_equal(read.array, organs) and np.allclose(read.affine, image.affine, atol=1e-6)
    places = {
        tuple(pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient): n
        for n, file in enumerate(series.files)
    }
    for segment, place, pixels in places_of_frames(tmp_path / "a.dcm"):
        assert np.array_equal(pixels.T > 0, organs[:, :, places[place]] == segment)
    a, b = (pydicom.dcmread(tmp_path / name, stop_before_pixels=True) for name in ("a.dcm", "b.dcm"))
    assert a.StudyInstanceUID == b.StudyInstanceUID and a.ReferencedSeriesSequence == b.ReferencedSeriesSequence
    write_volume(read, tmp_path / "a.nii.gz")
    assert np.array_equal(match_grid(read_volume(tmp_path / "a.nii.gz", labels=True), to=label).array, organs)


@pytest.mark.real
def test_a_real_slice_cut_short_is_named(real_data, tmp_path):
    for file in (real_data / "dicom_ct" / "example_ct_dicom").iterdir():
        (tmp_path / file.name[-2:]).symlink_to(file)
    cut = (tmp_path / "80").read_bytes()
    (tmp_path / "80").unlink()
    (tmp_path / "80").write_bytes(cut[:8000])
    with pytest.raises(InputError, match="80: cannot be read as DICOM"):
        read_volume(tmp_path)
